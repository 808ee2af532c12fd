"""A guider: a network that judges images, with its preprocessing, its task and what it is aimed at."""
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .cutouts import cut_outs
from .preprocess import Preprocess
from .tasks import TASKS, resize_map

Decode = Callable[[Tensor, Tensor], Tensor]
"""(latent (B, C, h, w), sigma (B,)) -> image (B, 3, H, W) in [-1, 1]"""


@dataclass(frozen=True)
class Guider:
    """A differentiable judge of images.

    image (B, 3, H, W) in [-1, 1] -> preprocess -> net(image, sigma) -> output -> task loss against the target -> (B,)
    Where a model diffuses latents, `decode` turns them into images.

    An off-the-shelf network ignores sigma (`IgnoreSigma`); an `ExpertBank` in its place uses it.
    """

    name: str                                # such as "tinyworld/class"; goes into the files of its experts
    net: Callable[..., Tensor]               # (preprocessed image, sigma[, prompt]) -> output
    preprocess: Preprocess
    task: str                                # a key of TASKS
    labels: tuple[str, ...] = ()             # names of the classes, if it has any
    view: str = "denoised"                   # what it looks at: "noisy" state or "denoised" prediction
    target: Tensor | None = None             # class (B|1,) long or weights (B|1, K); depth, mask (B|1, 1, h, w);
    #                                          segmentation (B|1, h, w) long; embedding (B|1, D); number (B|1, 1)
    prompt: Tensor | None = None             # (B|1, D), for networks that answer about a text
    read_text: Callable[[str], Tensor] | None = None  # text -> (1, D), for networks that know texts
    cutouts: int = 0                         # square parts of the image that are judged beside the whole
    decode: Decode | None = None             # makes images of latents; None for models of pixels

    def aim(self, target: Tensor) -> "Guider":
        """The same guider with a target."""
        return replace(self, target=target)

    def to_image(self, latent: Tensor, sigma: Tensor) -> Tensor:
        """The image (B, 3, H, W) of a latent (B, C, h, w) at noise levels (B,); images stay as they are."""
        return self.decode(latent, sigma) if self.decode else latent

    def fingerprint_fields(self) -> dict[str, object]:
        """Fields for `digest`, under the names by which version 0.1.0 recognises saved work."""
        return {"see" if name == "decode" else name: value for name, value in vars(self).items()}

    def predict(self, image: Tensor, sigma: Tensor) -> Tensor:
        """The network's output for images at noise levels (B,). ValueError where it waits for a text."""
        require_prompt(self)
        if self.prompt is None:
            return self.net(self.preprocess(image), sigma)
        prompt = _fit_for_autograd(self.prompt, image).to(image.dtype).expand(len(image), -1)
        return self.net(self.preprocess(image), sigma, prompt)

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        """How far each image is from the target, (B,), lower is better. ValueError without a target that fits."""
        task = TASKS[self.task]

        def loss(part: Tensor) -> Tensor:
            output = self.predict(part, sigma)
            return task.loss(output, self.target_for(part, output))

        energies = [loss(part) for part in (image, *cut_outs(image, self.cutouts, float(sigma[0])))]
        energy = sum(energies) / len(energies)
        return energy * image[0].numel() if task.sum_over_pixels else energy

    def score(self, image: Tensor, sigma: Tensor) -> Tensor:
        """How well each image meets the target, (B,) in [0, 1]. Judge with a network that did not guide."""
        output = self.predict(image, sigma)
        return TASKS[self.task].score(output, self.target_for(image, output))

    def target_for(self, image: Tensor, output: Tensor) -> Tensor:
        """The target, in the place of the images and the size of the answers. ValueError without one that fits."""
        if self.target is None:
            raise ValueError(f"the guider {self.name} has no target: it judges {self.task}; aim it first")
        if len(self.target) not in (1, len(image)):
            raise ValueError(f"the target of {self.name} is for {len(self.target)} images but {len(image)} are "
                             "sampled: give one target for all, or one for each")
        target = _fit_for_autograd(self.target, image)
        if TASKS[self.task].dense:
            return resize_map(target, output.shape[-2:])
        if target[0].numel() > 1 and target.shape[1:] != output.shape[1:]:
            raise ValueError(f"the target of {self.name} has the shape {tuple(target.shape[1:])} but its answers have "
                             f"{tuple(output.shape[1:])}: aim it at an image of the size that is sampled")
        return target


def _fit_for_autograd(tensor: Tensor, image: Tensor) -> Tensor:
    tensor = tensor.to(image.device)
    return tensor.clone() if tensor.is_inference() else tensor


class IgnoreSigma(nn.Module):
    """An off-the-shelf network as net(image, sigma[, prompt])."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, sigma: Tensor, *prompt: Tensor) -> Tensor:
        return self.net(image, *prompt)


def short_labels(descriptions: list[str]) -> tuple[str, ...]:
    """The first name of each class that no class before it has; 'crane 517' where there is none: without commas."""
    names: dict[str, str] = {}  # by what they are when case does not count: 'Cardigan' the dog, 'cardigan' the coat
    for index, description in enumerate(descriptions):
        choices = [*(part.strip() for part in description.split(",")), f"{description.split(',')[0]} {index}"]
        name = next(name for name in choices if name.lower() not in names)
        names[name.lower()] = name
    return tuple(names.values())


def require_prompt(guider: Guider) -> None:
    """ValueError if the network of a guider must be asked for a text and was not asked yet."""
    if TASKS[guider.task].has_prompt and guider.prompt is None and guider.read_text is not None:
        raise ValueError(f"{guider.name} marks what a text asks for, and was not asked yet: aim it at a text first")


def has_network(guider: Guider) -> bool:
    """Whether it has weights, as a network has and a rule has not."""
    return isinstance(guider.net, nn.Module) and any(True for _ in guider.net.parameters())


def clean(images: Tensor) -> Tensor:
    """The noise level of images without noise: zeros (B,)."""
    return images.new_zeros(len(images))


VIEWS = ("noisy", "denoised")
