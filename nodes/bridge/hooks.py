"""Attaching features to a MODEL, and the samplings that are under way with them."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from comfy.model_patcher import ModelPatcher

GUIDANCE, AUTOGUIDANCE, PRIOR, LORA = "ppap", "ppap_autoguidance", "ppap_prior", "ppap_tune"  # kinds of features
SAMPLES, PARTICLES = "ppap_samples", "ppap_particles"
Hook = Callable[..., Any]
State = TypeVar("State")


class Feature:
    """An object whose methods are hooks of a MODEL; all clones of that MODEL share it."""

    def __deepcopy__(self, memo: dict) -> "Feature":
        return self  # older versions of ComfyUI deep-copy a MODEL's options, and with them the owners of hooks


@dataclass(frozen=True)
class Hooks:
    """Where a feature acts on a MODEL."""

    wrappers: Mapping[str, Hook] = field(default_factory=dict)  # by ComfyUI's WrappersMP
    post_cfg: Hook | None = None
    additional_models: Sequence[ModelPatcher] = ()                   # loaded beside the MODEL
    feature: Feature | None = None                              # found again by `features_of`


def attach(model: ModelPatcher, key: str, hooks: Hooks) -> None:
    """Add hooks to a MODEL in place, after those that are there.

    key: the kind of feature, one of those above; it keeps ComfyUI's lists of different kinds apart.
    """
    for kind, wrapper in hooks.wrappers.items():
        model.add_wrapper_with_key(kind, key, wrapper)
    if hooks.post_cfg:
        model.set_model_sampler_post_cfg_function(hooks.post_cfg)
    if hooks.additional_models:
        model.set_additional_models(key, [*model.get_additional_models_with_key(key), *hooks.additional_models])
    if hooks.feature:
        model.set_attachments(key, (*features_of(model, key), hooks.feature))


def features_of(model: ModelPatcher, key: str) -> tuple:
    """Every feature of one kind that is attached to a MODEL, in the order of the wire."""
    return model.get_attachment(key) or ()


class RunStack(Generic[State]):
    """The state of samplings that are under way, the innermost last: one may begin and end while another one runs."""

    def __init__(self) -> None:
        self._states: list[State] = []

    @contextmanager
    def running(self, state: State) -> Iterator[State]:
        """Make a state the current one for as long as its sampling takes, whether that ends well or not."""
        self._states.append(state)
        try:
            yield state
        finally:
            self._states.pop()

    @property
    def current(self) -> State:
        if not self._states:
            raise ValueError("a guided model was asked for a prediction outside of a sampling: sample it with a KSampler or "
                             "SamplerCustom node")
        return self._states[-1]
