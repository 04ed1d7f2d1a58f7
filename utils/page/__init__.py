"""The page of app.py: photographs are judged in a browser on this computer, and nothing is sent anywhere."""

import os

# Read when gradio and huggingface_hub are imported: neither asks for versions nor reports its use.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
