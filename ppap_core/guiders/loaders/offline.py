"""No network while a guider is loaded: the hub's client is told so, and no configuration names a page of the hub."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_one_at_a_time = threading.RLock()


class _OfflineHere:
    """True in the thread that made it, and elsewhere what was set before."""

    def __init__(self, elsewhere: object):
        self.thread, self.elsewhere = threading.get_ident(), elsewhere

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread or bool(self.elsewhere)


@contextmanager
def offline() -> Iterator[None]:
    """Context manager: let the hub's client answer this thread from its cache only, and other threads as before."""
    from huggingface_hub import constants

    with _one_at_a_time:
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = _OfflineHere(before)  # type: ignore[assignment]
        _forget_sessions()
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before
            _forget_sessions()


def _forget_sessions() -> None:
    """Before version 1 the client asks whether it is offline only when it opens a session."""
    import huggingface_hub

    if hasattr(huggingface_hub, "configure_http_backend"):
        huggingface_hub.utils.reset_sessions()


def settled(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration that says all by itself: backbones by their settings and not by their names, no code from the hub.

    The precision is left out too: some releases would round the weights to it before they are read.

    config: the content of a config.json of transformers. name: of its folder, for sentences. ValueError for a backbone whose
    settings are on the hub alone.
    """
    config = {key: settled(value, name) if isinstance(value, dict) else value for key, value in config.items()
              if not key.endswith(("attn_implementation", "dtype"))}  # the former may name a page with compiled code
    if config.get("model_type") == "timm_backbone":
        if ":" in str(config.get("backbone")):  # timm would ask for its settings, even without its weights
            raise ValueError(f"{name}/config.json names the backbone {config['backbone']}, which is on the hub, and nothing "
                             "is downloaded while a network is loaded: expected one of timm.list_models()")
        return config | {"use_pretrained_backbone": False}
    if "use_pretrained_backbone" in config:
        config["use_pretrained_backbone"] = False
    backbone = config.get("backbone")
    if not isinstance(backbone, str) or not backbone:
        return config
    if not config.get("backbone_config"):
        config["backbone_config"] = _backbone_settings(backbone, config, name)
    return config | {"backbone": None, "use_timm_backbone": False, "backbone_kwargs": None}


def _backbone_settings(backbone: str, config: dict[str, Any], name: str) -> dict[str, Any]:
    kwargs = config.get("backbone_kwargs") or {}
    backbone = backbone.removeprefix("timm/")  # timm's pages of the hub are called as its networks
    if config.get("use_timm_backbone") or "/" not in backbone:
        renamed = {{"in_chans": "num_channels"}.get(key, key): value for key, value in kwargs.items()}
        return settled({"model_type": "timm_backbone", "backbone": backbone, **renamed}, name)
    from transformers import AutoConfig

    try:
        with offline():
            return settled(AutoConfig.from_pretrained(backbone, local_files_only=True, **kwargs).to_dict(), name)
    except Exception as error:  # of each version of the client another one
        raise ValueError(f"{name}/config.json names the backbone {backbone}, whose settings are on the hub, and nothing is "
                         "downloaded while a network is loaded: expected them under 'backbone_config'; put there what "
                         f"https://huggingface.co/{backbone}/raw/main/config.json says, and take 'backbone' out") from error
