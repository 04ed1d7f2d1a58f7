"""Testing the loops of a training as they come, beside the base that it started from."""

from collections.abc import Callable, Iterator
from pathlib import Path

from model.adapter_cross_attention import CrossAttentionCLIP
from utils.checkpoints import Checkpoint, checkpoint_names, load_checkpoint
from utils.testing.bench import Bench
from utils.testing.comparison import Comparison
from utils.testing.contenders import Contender
from utils.testing.measure import measure
from utils.testing.results import Results


class LoopTests:
    """Tests loop files on `benches`; the base, the run's loop_0.pth, is tested with the first of them alone."""

    def __init__(self, benches: list[Bench], load: Callable[[Checkpoint], CrossAttentionCLIP]):
        self.benches, self.load = benches, load
        self._base: Contender | None = None
        self._of_base: dict[str, dict[Contender, Results | None]] = {}

    def test(self, path: Path, after_batch: Callable[[], None]) -> Iterator[Comparison]:
        """Compare the loop file at `path` with the base on every bench; `after_batch` may end it by an exception.

        Nothing comes of it in other processes than the first, which all take part.
        """
        if not self.benches:
            return
        checkpoint = load_checkpoint(path)
        name = checkpoint_names([checkpoint])[0]
        if self._base is None:
            base = load_checkpoint(path.parent / "loop_0.pth")
            self._base = Contender(base, self.load(base), checkpoint_names([base])[0])
        loop = Contender(checkpoint, self.load(checkpoint), name, {"base": self._base})
        for bench in self.benches:
            earlier = self._of_base.get(bench.data.name)
            comparison = measure(bench, [self._base, loop], earlier=earlier, after_batch=after_batch)
            if earlier is None:
                self._of_base[bench.data.name] = {self._base: comparison.results[0] if comparison else None}
            if comparison:
                yield comparison
