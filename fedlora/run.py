"""A run, and what is done with it: the `Run` of the public interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.record import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedlora.evaluating import Evaluated
    from fedlora.exporting import Answer
    from fedlora.tasks.contract import Prompt


@dataclass(frozen=True)
class Run(Record):
    """A run folder, in whatever state it is. What is done with it is also there as functions, such as `report`."""

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, as peft loads it.

        Raises:
            UserError: it has none yet.
        """
        from fedlora.exporting import adapter_of

        return adapter_of(self)

    def state_dict(self) -> "dict[str, NDArray[np.float32]]":
        """The adapter's tensors by their names in peft.

        Raises:
            UserError: it has none yet.
        """
        from safetensors.numpy import load_file

        return load_file(self.adapter / "adapter_model.safetensors")

    def report(self, out: str | Path | None = None, drawn: str | Path | None = None, share: bool = False) -> Path:
        """Its page; as `fedlora.report`."""
        from fedlora.reports.single import report

        return report(self, out, drawn, share)

    def predict(self, texts: "Sequence[Prompt]", max_new_tokens: int = 64, **told: Any) -> "list[Answer]":
        """What its model makes of texts; as `fedlora.predict`."""
        from fedlora.exporting import predict

        return predict(self, texts, max_new_tokens, **told)

    def generate(self, prompts: "Sequence[Prompt]", max_new_tokens: int = 64, **told: Any) -> "list[Answer]":
        """What its model goes on with; as `fedlora.generate`."""
        from fedlora.exporting import generate

        return generate(self, prompts, max_new_tokens, **told)

    def evaluate(self, data: str | Path, metrics: Sequence[str] | None = None, **told: Any) -> "Evaluated":
        """Its figures on the rows of a file; as `fedlora.evaluate`."""
        from fedlora.evaluating import evaluate

        return evaluate(self, data, metrics, **told)

    def export(self, out: str | Path, merge: bool = False, **told: Any) -> Path:
        """Copy its adapter, or merge it into the base; as `fedlora.export`."""
        from fedlora.exporting import export

        return export(self, out, merge, **told)
