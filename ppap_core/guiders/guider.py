"""A guider: a network that judges images, with its preprocessing, its task and its target."""
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from torch import Tensor, nn

from .cutouts import cut_outs
from .latents import View
from .preprocess import CHANNELS, PADDINGS, Preprocess
from .tasks import TASKS, resize_map

Decode = Callable[[Tensor, Tensor], Tensor]
"""(latent (B, C, h, w), sigma (B,)) -> image (B, 3, H, W) in [-1, 1]; computes in a type of its own, outside of autocast

One that knows the other latents of a batch, as of a video, has a method `sliced(part)`: the decoder for a slice of them.
"""


@dataclass(frozen=True)
class Guider:
    """A differentiable judge of images: its energy is how far an image is from a target.

    image (B, 3, H, W) in [-1, 1] -> preprocess -> net(image, sigma[, prompt]) -> output -> loss of its task -> (B,)

    An off-the-shelf network ignores sigma (`IgnoreSigma`); an `ExpertBank` in its place uses it. The names of the fields
    are part of the identity of saved work.
    """

    name: str                       # such as "tinyworld/class"; written into the files of its experts
    net: Callable[..., Tensor]      # (preprocessed image, sigma[, prompt]) -> output
    preprocess: Preprocess
    task: str                       # a key of TASKS
    labels: tuple[str, ...] = ()    # names of the classes, if it has any
    view: View = "denoised"         # judges the "noisy" state on the variance-preserving scale, or the "denoised" prediction
    target: Tensor | None = None    # for the loss of its task, of one image for all or one for each, (B|1, ...)
    prompt: Tensor | None = None    # (B|1, D), for networks that are asked for a text
    read_text: Callable[[str], Tensor] | None = None  # text -> (1, D), for networks that know texts
    cutouts: int = 0                # square parts of the image that are judged beside the whole; 0: only the whole
    decode: Decode | None = None    # makes images of latents; None for models of pixels

    def aim(self, target: Tensor) -> "Guider":
        """This guider with a target for the loss of its task, (1, ...) for all images or (B, ...) for each."""
        return replace(self, target=target)

    def to_image(self, latent: Tensor, sigma: Tensor) -> Tensor:
        """The image (B, 3, H, W) of a latent (B, C, h, w) at noise levels (B,); images stay as they are."""
        return self.decode(latent, sigma) if self.decode else latent

    def fingerprint_fields(self) -> dict[str, object]:
        """Fields for `digest`, under the names by which version 0.1.0 recognises saved work."""
        return {"see" if name == "decode" else name: value for name, value in vars(self).items()}

    def predict(self, image: Tensor, sigma: Tensor) -> Tensor:
        """Output of the network for images (B, 3, H, W) in [-1, 1] at noise levels (B,).

        ValueError for a network that waits for a text.
        """
        require_prompt(self)
        if self.prompt is None:
            return self.net(self.preprocess(image), sigma)
        prompt = _fit_for_autograd(self.prompt, image).to(image.dtype).expand(len(image), -1)
        return self.net(self.preprocess(image), sigma, prompt)

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        """Distance of images (B, 3, H, W) in [-1, 1] at noise levels (B,) from the target, (B,); lower is better.

        With cut-outs the mean over the whole and its parts. ValueError without a target that fits.
        """
        energy = self._loss(image, sigma)
        for part in cut_outs(image, self.cutouts, float(sigma[0])):
            energy = energy + self._loss(part, sigma)
        energy = energy / (1 + self.cutouts)
        return energy * image[0].numel() if TASKS[self.task].sum_over_pixels else energy

    def _loss(self, image: Tensor, sigma: Tensor) -> Tensor:
        output = self.predict(image, sigma)
        return TASKS[self.task].loss(output, self.target_for(image, output))

    def score(self, image: Tensor, sigma: Tensor) -> Tensor:
        """How well images (B, 3, H, W) in [-1, 1] meet the target, (B,) in [0, 1]. ValueError without a target that fits.

        As a measure of guidance, take a network that did not guide.
        """
        output = self.predict(image, sigma)
        return TASKS[self.task].score(output, self.target_for(image, output))

    def target_for(self, image: Tensor, output: Tensor) -> Tensor:
        """The target on the device of the images, resized to a dense output. ValueError without one that fits."""
        if self.target is None:
            raise ValueError(f"the guider {self.name} has no target: it judges {self.task}; aim it first")
        if len(self.target) not in (1, len(image)):
            raise ValueError(f"the target of {self.name} is for {len(self.target)} images but {len(image)} are "
                             "sampled: give one target for all, or one for each")
        target = _fit_for_autograd(self.target, image)
        if TASKS[self.task].dense:
            return self._resized(target, output)
        if target[0].numel() > 1 and target.shape[1:] != output.shape[1:]:
            raise ValueError(f"the target of {self.name} has the shape {tuple(target.shape[1:])} but its outputs have "
                             f"{tuple(output.shape[1:])}: aim it at an image of the size that is sampled")
        return target

    def _resized(self, target: Tensor, output: Tensor) -> Tensor:
        own = TASKS[self.task].target_of(output[:1].detach())
        if target.ndim != own.ndim or target.shape[1:-2] != own.shape[1:-2]:
            expected = ", ".join([*map(str, own.shape[1:-2]), "height", "width"])
            raise ValueError(f"the target of {self.name} has the shape {tuple(target.shape[1:])}: expected ({expected}), as "
                             f"{self.task} needs it; aim it at an image or at a map for this task")
        return resize_map(target, (output.shape[-2], output.shape[-1]))


def _fit_for_autograd(tensor: Tensor, image: Tensor) -> Tensor:
    tensor = tensor.to(image.device)
    return tensor.clone() if tensor.is_inference() else tensor


class IgnoreSigma(nn.Module):
    """An off-the-shelf network, frozen, as net(image, sigma[, prompt])."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, sigma: Tensor, *prompt: Tensor) -> Tensor:
        return self.net(image, *prompt)


def short_labels(descriptions: Sequence[str]) -> tuple[str, ...]:
    """Unique short labels without commas: the first synonym that no class before it has, else "name index".

    descriptions: of each class its synonyms, separated by commas, such as "crane, heron". Names are compared by `fold_name`.
    """
    names: dict[str, str] = {}
    for index, description in enumerate(descriptions):
        name = next(name for name in _choices(description, index) if name and fold_name(name) not in names)
        names[fold_name(name)] = name
    return tuple(names.values())


def _choices(description: str, index: int) -> Iterator[str]:
    synonyms = [part.strip() for part in description.split(",")]
    yield from synonyms
    yield f"{synonyms[0]} {index}".strip()
    yield from (f"{synonyms[0]} {index}.{more}".strip() for more in count(1))


def fold_name(name: str) -> str:
    """A name as it is compared with others: without regard to case, and to how an accented letter is encoded."""
    return unicodedata.normalize("NFC", name).casefold()


def with_input(guider: Guider, channels: str = "own", padding: str = "own") -> Guider:
    """The guider whose network gets images in another way than its files say.

    channels: a key of CHANNELS, padding: of PADDINGS; with "own" nothing changes. ValueError for any other.
    """
    for value, choices in ((channels, CHANNELS), (padding, PADDINGS)):
        if value not in choices:
            raise ValueError(f"there is no way '{value}' to read an image: expected one of {', '.join(choices)}")
    changes = {**CHANNELS[channels], **PADDINGS[padding]}
    return replace(guider, preprocess=replace(guider.preprocess, **changes)) if changes else guider


def require_prompt(guider: Guider) -> None:
    """ValueError if the network of a guider must be asked for a text and was not asked yet."""
    if TASKS[guider.task].has_prompt and guider.prompt is None and guider.read_text is not None:
        raise ValueError(f"{guider.name} marks what a text asks for, and was not asked yet: aim it at a text first")


def has_network(guider: Guider) -> bool:
    """Whether a guider has weights; a rule has none."""
    return isinstance(guider.net, nn.Module) and any(True for _ in guider.net.parameters())


def clean(images: Tensor) -> Tensor:
    """Noise levels of images without noise: zeros (B,)."""
    return images.new_zeros(len(images))
