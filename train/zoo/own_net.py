"""timm's interface over any classifier whose logits come from a linear layer, with the classifier's own names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cache_tools.errors import RecipeError

_INNER = "network."


class OwnNetwork(nn.Module):
    """A network of one's own. Its features are the input of the linear layer that gives its logits.

    State dicts have the network's own names, so that its checkpoints load here and ours there.

    Args:
        classifier: the linear layer, a module of the network.
        name: of the network, for messages.
    """

    def __init__(self, network: nn.Module, classifier: nn.Linear, name: str, num_classes: int) -> None:
        super().__init__()
        self.network, self.name = network, name
        self._classifier_name = next(key for key, module in network.named_modules() if module is classifier)
        self.num_classes, self.num_features = num_classes, classifier.in_features
        config = getattr(network, "pretrained_cfg", None)
        if config is not None:
            self.pretrained_cfg = config
        self.register_state_dict_post_hook(_to_own_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_from_own_names)  # type: ignore[no-untyped-call]

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → logits [N, num_classes]."""
        logits: torch.Tensor = self.network(images_NCHW)
        return logits

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → features [N, num_features], the input of the linear layer.

        Raises:
            RecipeError: the logits are not what the linear layer gives.
        """
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen.append((inputs[0], output))

        hook = self.get_classifier().register_forward_hook(keep)
        try:
            logits = self.network(images_NCHW)
        finally:
            hook.remove()
        if len(seen) != 1 or not _same(logits, seen[0][1]):
            raise RecipeError(
                "the logits of this network are not the output of its last linear layer",
                where=f"{self.name}, layer {self._classifier_name or 'itself'}",
                expected="a forward pass that returns what this layer gives, once",
                found=f"{type(logits).__name__}{f' {list(logits.shape)}' if isinstance(logits, torch.Tensor) else ''}",
                next_step="return the logits themselves, or add timm's forward_features, forward_head(x, pre_logits), "
                "get_classifier and num_features",
            )
        return seen[0][0]

    def forward_head(self, features_ND: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features → logits [N, num_classes], or the features themselves with `pre_logits`."""
        return features_ND if pre_logits else self.get_classifier()(features_ND)

    def get_classifier(self) -> nn.Linear:
        """The linear layer from features to logits."""
        linear = self.network.get_submodule(self._classifier_name)
        assert isinstance(linear, nn.Linear)
        return linear


def _to_own_names(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
    """Remove our `network.` from the names of a state dict."""
    inner = f"{prefix}{_INNER}"
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _from_own_names(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
    """Add our `network.` to the names of a state dict that is about to be loaded."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}{_INNER}{key.removeprefix(prefix)}"] = state.pop(key)


def _same(logits: Any, output: torch.Tensor) -> bool:
    """Whether the network returns the output of its linear layer, perhaps in another precision."""
    if logits is output:
        return True
    if not isinstance(logits, torch.Tensor) or logits.shape != output.shape:
        return False
    return torch.equal(logits.detach().to(output.dtype), output.detach())
