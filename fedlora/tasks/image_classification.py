"""Image classification: each image has one of a list of labels."""

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.reading import Rows
from fedlora.data.store import Encoded, Examples
from fedlora.data.targets import one_each
from fedlora.errors import SettingError, UserError
from fedlora.seeding import generator
from fedlora.tasks import base_model
from fedlora.tasks.causal_lm import no_pairs
from fedlora.tasks.classification import Classification, likeliest, no_answers
from fedlora.tasks.contract import Batch, Problem

if TYPE_CHECKING:
    import torch

_IMAGES = 32  # of an evaluation batch


class ImageClassification(Classification):
    """The label of an image; images are channels of bytes of one size, so that nothing is packed or padded."""

    task_type = None
    auto = "AutoModelForImageClassification"
    tokens = False
    shape: tuple[int, int, int]  # channels, height and width
    scale: tuple[float, "torch.Tensor", "torch.Tensor"]  # of brightness, then mean and deviation of each channel

    @classmethod
    def needs(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """A folder of images, or a dataset of the Hub."""
        data = sections.get("data")
        if data and data.files:
            yield ("data", "files"), "rows of text hold no images: name a folder of them as data.hub.path"
        yield from no_pairs(sections)
        yield from no_answers(sections)

    @classmethod
    def reader(cls, base: str, revision: str | None) -> Any:
        """The base model's image processor."""
        return base_model.load_processor(base, revision)

    @classmethod
    def encode(cls, reader: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
        """Each image in colour, at the model's size, as bytes (3, height, width) in a row, not yet scaled.

        Raises:
            SettingError: a row is no image.
        """
        from PIL import Image

        pixels = []
        for at, held in enumerate(rows.texts):
            try:
                image = Image.open(io.BytesIO(held if isinstance(held, bytes) else b"")).convert("RGB")
            except OSError as error:
                raise SettingError(
                    "data.hub.text", f"row {at} holds no image: name the column of images"
                ) from error
            made = reader(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
            pixels.append(np.asarray(made).round().clip(0, 255).astype(np.uint8).ravel())
        return Encoded(pixels, one_each(rows, labels))

    @classmethod
    def answer(
        cls, model: Any, reader: Any, text: str, labels: Sequence[str], max_length: int, max_new_tokens: int
    ) -> tuple[str, float | None]:
        """The likeliest label of an image by its file, and its probability.

        Raises:
            UserError: the file holds no image.
        """
        from PIL import Image

        try:
            image = Image.open(text).convert("RGB")
        except OSError as error:
            raise UserError(f"{text}: holds no image that can be read") from error
        return likeliest(model, {"pixel_values": reader(image, return_tensors="pt")["pixel_values"]}, labels)

    def sees(self, processor: Any) -> None:
        """Take on the size and the scale of brightness of a base model's image processor."""
        import torch

        blank = np.zeros((8, 8, 3), np.uint8)
        self.shape = processor(blank, return_tensors="np")["pixel_values"].shape[1:]
        told = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
        mean, deviation = (torch.tensor(t, device=self.device).view(-1, 1, 1) for t in told)
        self.scale = (processor.rescale_factor if processor.do_rescale else 1.0, mean, deviation)

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch:
        """`pixel_values` (examples, channels, height, width), `targets` (examples,), on the device."""
        pixels = np.stack([examples.row(int(row)).reshape(self.shape) for row in rows])
        factor, mean, deviation = self.scale
        return {
            "pixel_values": (self.place(pixels) * factor - mean) / deviation,
            "targets": self.place(examples.targets[rows]),
        }

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Of each image, (examples, labels)."""
        logits: torch.Tensor = self._run(batch).logits.float()
        return logits

    def at_once(self, longest: int) -> int:
        """Thirty-two, whatever their size."""
        return _IMAGES

    def samples(self, max_length: int, special: Collection[int]) -> Examples:
        """Three images of random bytes."""
        pixels = int(np.prod(self.shape))
        some = generator(0, "check").integers(0, 256, 3 * pixels).astype(np.uint8)
        return Examples(some, np.arange(4) * pixels, np.zeros(3, np.int64))
