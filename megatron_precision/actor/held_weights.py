"""The parameters that a rank of the trainer holds, as boxes of Hugging Face tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from megatron_precision.actor.main_copies import MainCopies
from megatron_precision.actor.optimizer import ActorOptimizer
from megatron_precision.actor.parallel import coordinates
from megatron_precision.config import RunConfig
from megatron_precision.errors import Problem, UserError
from megatron_precision.weights.megatron_layout import megatron_pieces
from megatron_precision.weights.regions import Piece


class HeldWeights:
    """This rank's.

    Args:
        module: its stage of the model.
        optimizer: which has the FP32 main copies.
        config: the run's.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: ActorOptimizer, config: RunConfig
    ) -> None:
        self._module, self._optimizer = module, optimizer
        self._config, self._policy = config.model, config.policy

    def live(self) -> list[tuple[Piece, torch.Tensor]]:
        """Every piece of the model on this rank, with the live parameter that holds it."""
        return [(piece, live.data) for _, live, pieces in self.parameters() for piece in pieces]

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter, list[Piece]]]:
        """Every parameter of this rank, with its name and what it holds."""
        at = coordinates(self._config.num_experts, self._config.num_hidden_layers)
        for name, parameter in self._module.named_parameters():
            pieces = megatron_pieces(name, tuple(parameter.shape), self._config, at)
            yield name, parameter, pieces

    def main_copies(self) -> MainCopies:
        """The FP32 main copies on this rank."""
        return MainCopies.of(self.parameters(), self._optimizer)

    def views(self) -> list[tuple[Piece, torch.Tensor]]:
        """Every piece of the model on this rank, with its strided view of the live parameter."""
        return [(piece, live.view(piece.view)[piece.spans]) for piece, live in self.live()]

    @contextlib.contextmanager
    def changed(self, change: Callable[[Piece, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Hold changed weights for a while, then the true ones again; no step may be taken.

        Args:
            change: (piece, its values) to new values of the same shape.
        """
        pieces = self.views()
        held = [view for _, view in pieces]
        with_main_copies = self._policy.wire_source == "main_copies"
        if with_main_copies:
            held += [values for _, values in self.main_copies().held]
        true = [view.clone() for view in held]
        try:
            with torch.no_grad():
                for piece, view in pieces:
                    view.copy_(change(piece, view))
            if with_main_copies:
                self._optimizer.reload_main_params()
            yield
        finally:
            with torch.no_grad():
                for view, values in zip(held, true, strict=True):
                    view.copy_(values)
            if with_main_copies:
                self._optimizer.main_copies_changed()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Any]) -> None:
        """Load Hugging Face tensors (any float dtype), padded vocabulary rows zeroed.

        Args:
            tensors: by name; tensors, or what gives one for a box.

        Raises:
            KeyError: for a tensor that is missing.
            UserError: for values that the parameters' dtype cannot hold.
        """
        for name, parameter in self._module.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameter.zero_()
        beyond = []
        for piece, view in self.views():
            view.copy_(tensors[piece.hf_name][piece.box].reshape(view.shape))
            if self._policy.params == "fp16" and not torch.isfinite(view).all():
                beyond.append(piece.hf_name)
        if beyond:
            raise UserError(
                Problem(
                    "weights outside the range of fp16", "start.checkpoint",
                    ", ".join(dict.fromkeys(beyond)), "values up to 65504",
                    "the converter's audit lists them: python -m tools.checkpoint_convert audit",
                )
            )  # fmt: skip
        self._optimizer.reload_main_params()
