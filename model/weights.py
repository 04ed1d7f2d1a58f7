"""Weight files of CLIP: found, read without running anything in them, and checked before a tensor is used."""

import hashlib
import logging
from pathlib import Path
from textwrap import shorten
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import open_clip
import torch
from huggingface_hub import hf_hub_download
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from torch import Tensor

from model.config import REPOSITORY, WEIGHT_FOLDERS
from model.pickles import not_weights, read_archive

logger = logging.getLogger(__name__)

# How long an answer of the network is waited for.
NETWORK_SECONDS = 5
WEIGHT_SUFFIXES = (".pt", ".pth", ".safetensors", ".bin")
# Entries of OpenAI's archives that are no weights, by the ends of their names.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
# The kinds of numbers that weights are.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_weights(model_name: str, clip_weights: str | Path | None = None) -> Path:
    """The weight file of `model_name`: `clip_weights`, else a known name in `WEIGHT_FOLDERS`, else a download.

    open_clip downloads. Raises FileNotFoundError that lists what was tried.
    """
    if clip_weights is not None:
        if not Path(clip_weights).is_file():
            what = "a folder, where a file was expected" if Path(clip_weights).is_dir() else "no such file"
            raise FileNotFoundError(f"--clip_weights {clip_weights}: {what}.")
        return Path(clip_weights)
    names = [f"{stem}{suffix}" for stem in (model_name, f"{model_name}px") for suffix in WEIGHT_SUFFIXES]
    folders = list(dict.fromkeys(root / folder for root in (REPOSITORY, Path.cwd()) for folder in WEIGHT_FOLDERS))
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    source = open_clip.get_pretrained_cfg(model_name, "openai")
    addresses = _addresses(source)
    reason = "open_clip lists no OpenAI weights for it"
    if addresses:
        logger.info("No weights of %s in %s; trying to download them.", model_name, ", ".join(WEIGHT_FOLDERS))
        try:
            return _downloaded(source, addresses)
        except Exception as error:  # open_clip, the hub and urllib each raise their own kinds; reported below
            reason = f"download failed: {shorten(str(error), 160)} ({type(error).__name__})"
    known = " or ".join(f"{address} (as {model_name}{Path(address).suffix})" for address in addresses)
    raise FileNotFoundError(
        f"No weights for {model_name}.\n"
        f"  tried: {', '.join(names)}\n"
        f"  in:    {', '.join(str(folder) for folder in folders)}\n"
        f"  and:   {reason}\n"
        f"Download {known or 'a checkpoint of this model (as one of these names)'} into {folders[0]}, "
        "or give the file with --clip_weights FILE."
    )


def _downloaded(source: dict, addresses: list[str]) -> Path:
    """The file of an entry of open_clip's pretrained list, from its cache where there is no network.

    Whether there is one is asked first: Hugging Face's library tries again and again, for a minute.
    """
    try:
        urlopen(Request(addresses[-1], method="HEAD"), timeout=NETWORK_SECONDS).close()
    except HTTPError:
        pass  # somebody answered
    except OSError as error:
        if source.get("hf_hub"):
            try:
                return Path(hf_hub_download(*_hub_file(source), local_files_only=True))
            except Exception as missing:  # the hub's own kinds
                raise ConnectionError(f"no network: {getattr(error, 'reason', error)}") from missing
    return Path(open_clip.download_pretrained(source))


def _addresses(source: dict) -> list[str]:
    """Where the file of an entry of open_clip's pretrained list is: its own address, Hugging Face, both or neither.

    Which of the two an entry has differs between versions of open_clip.
    """
    addresses = [source["url"]] if source.get("url") else []
    if source.get("hf_hub"):
        repository, name = _hub_file(source)
        addresses.append(f"https://huggingface.co/{repository}/resolve/main/{name}")
    return addresses


def _hub_file(source: dict) -> tuple[str, str]:
    """Repository and file of an entry at Hugging Face, whose `hf_hub` is "owner/name/" or "owner/name/file"."""
    repository, _, name = source["hf_hub"].rpartition("/")
    return repository, name or HF_SAFE_WEIGHTS_NAME


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict of a TorchScript archive (OpenAI's), a .pt/.pth/.bin state dict or a .safetensors file.

    Raises ValueError where the file is none of these, is damaged, or holds anything but weights.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                content: object = load_file(path)
            except SafetensorError as error:
                raise ValueError(not_weights(path) or str(error)) from error
        else:
            content = read_archive(path)
    except Exception as error:  # of unpickling, zip files and safetensors, which share no base class
        raise ValueError(f"{path}: not readable as CLIP weights ({shorten(str(error)[:1000], 240)}).") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a state dict of tensors, found {type(content).__name__}.")
    weights = {name: value for name, value in content.items() if str(name).rpartition(".")[2] not in NOT_WEIGHTS}
    check_weights(weights, str(path))
    state = {name.removeprefix("module."): value for name, value in weights.items()}
    if len(state) < len(weights):
        raise ValueError(f"{path}: holds the same weights with and without 'module.' before their names; expected one.")
    return state


def check_weights(state: dict, where: str) -> None:
    """Raise ValueError, beginning with `where`, for the first entry that is no tensor of finite real numbers."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{where}: expected a state dict of tensors; {_quoted(name)} is {type(value).__name__}.")
        if value.dtype not in FLOATS:
            raise ValueError(f"{where}: {_quoted(name)} holds {value.dtype}; expected floating-point numbers.")
        if not value.isfinite().all():
            raise ValueError(f"{where}: {_quoted(name)} holds numbers that are not finite; train or download it anew.")


def _quoted(name: object) -> str:
    """A name of a file in a message: on one line, and cut where it is long."""
    return repr(name if isinstance(name, int) else str(name)[:80])


def check_state(expected: dict[str, Tensor], found: dict[str, Tensor], where: str, but: str | None = None) -> None:
    """Raise ValueError, beginning with `where`, for the first key that is missing, unknown or of another shape.

    That of the key `but` may be any.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{where} lacks '{name}', shape {list(expected[name].shape)}.")
        if name not in expected:
            raise ValueError(f"{where} holds {_quoted(name)}, which the model does not have.")
        if expected[name].shape != found[name].shape and name != but:
            shapes = f"shape {list(found[name].shape)}, expected {list(expected[name].shape)}"
            raise ValueError(f"{where} holds '{name}' of another size: {shapes}.")


def weights_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over the float32 tensors sorted by name, so that one set of weights agrees in every file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
