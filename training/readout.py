"""From last hidden states to logits: a forward that ends before its output head, and the model's own code after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from latefusion.models.executor.around import Around
from latefusion.training.loss import Read


class _Reached(Exception):
    """Ends a forward at its output head, with what the forward is to return."""


class Readout:
    """The way from a model's last hidden states to its logits: the output head, then what some families add to it.

    That last part (Gemma's cap, Granite's scale, ...) is code of the model's own `forward`. It runs on a shadow of the
    model: the same object, whose body returns nothing and whose head returns a product that is already there.

    Args:
        model: a Hugging Face model; adapters may be inside.
        sharded: weights lie in shards that only a call of the module itself gathers (ZeRO-3).

    Attributes:
        splits: rows of hidden states can be read apart from the forward. False: the head is not where `forward` calls
            it by name, or adapters inside the head have shards of their own.
    """

    def __init__(self, model: PreTrainedModel, *, sharded: bool = False):
        self.model: Any = model
        self.head: Any = model.get_output_embeddings()
        self._product = _Product()
        names = {child: name for name, child in self.model.named_children()}
        body, head = names.get(model.base_model), names.get(self.head)
        self.splits = False
        if body is not None and head is not None:
            self._shadow = object.__new__(type(model))
            modules = {**model._modules, body: _Body(), head: self._product}
            vars(self._shadow).update({**vars(model), "_modules": modules})
            self.splits = not (sharded and any(self.head.children())) and self._try_after_head()

    def _try_after_head(self) -> bool:
        """Whether the code after the head runs on a row alone, tried on one; `changes`: it does something."""
        product = torch.linspace(-99, 99, self.model.config.get_text_config().vocab_size)[None]
        try:
            logits = self._finish(product.clone())
        except Exception:  # another forward than those of transformers
            return False
        self.changes = not torch.equal(logits, product)
        return logits.shape == product.shape

    def _finish(self, product: Tensor) -> Tensor:
        """The logits `[N, V]` of what the head returned."""
        self._product.rows = product[None]
        try:
            ids = torch.zeros(1, 1, dtype=torch.long, device=product.device)
            return type(self.model).forward(self._shadow, input_ids=ids).logits[0]
        finally:
            self._product.rows = None

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those of the head that train."""
        return [weight for weight in self.head.parameters() if weight.requires_grad]

    @contextmanager
    def ending_before_head(self, learnt: Tensor, use: Callable[[Tensor], Any]) -> Iterator[None]:
        """The forward inside returns `use(rows)` in place of its logits.

        Args:
            learnt: bool `[B, R]`, the positions to read, among those that the head would get.
            use: called where the head would be, under the forward's autocast, with last hidden states `[N, D]`.
        """

        def reached(head: nn.Module, args: tuple[Any, ...]) -> None:
            handle.remove()
            raise _Reached(use(args[0][learnt]))

        def forward(stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            try:
                return stock(*args, **kwargs)
            except _Reached as reached:
                return reached.args[0]

        # prepended: before DeepSpeed's own hook, which would gather the head's weights
        handle = self.head.register_forward_pre_hook(reached, prepend=True)
        around = Around(self.model, "forward", forward)
        try:
            yield
        finally:
            around.remove()
            handle.remove()

    def call_head(self, rows: Tensor, work: Callable[[Tensor, Read], Tensor]) -> Tensor:
        """`work(rows, read)` inside one call of the head, whose hooks gather weights that lie in shards."""

        def forward(stock: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            return work(args[0], lambda chunk: self.finished(stock(chunk)))

        around = Around(self.head, "forward", forward)
        try:
            return self.head(rows)
        finally:
            around.remove()

    def read(self, rows: Tensor) -> Tensor:
        """Rows `[N, D]` of a model that runs by itself, in the dtype of its weights, to logits `[N, V]`."""
        with torch.autocast(rows.device.type, enabled=False):
            return self.finished(self.head(rows))

    def finished(self, product: Tensor) -> Tensor:
        """The logits of what the head returned, `[N, V]`."""
        return self._finish(product) if self.changes else product

    def of_base(self, read: Read) -> Read:
        """The base's way from rows to logits, given the adapted model's: the head without its adapters."""
        if isinstance(self.head, BaseTunerLayer):
            base = self.head.get_base_layer()
        elif isinstance(self.head, AuxiliaryTrainingWrapper):
            base = self.head.original_module
        else:
            return read
        return lambda chunk: self.finished(base(chunk))


class _Body(nn.Module):
    """Returns hidden states that nobody reads, and None under any other name."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return _Output(torch.zeros(1, 1, 1, device=input_ids.device))


class _Output:
    def __init__(self, hidden_states: Tensor):
        self.last_hidden_state = hidden_states  # [1, 1, 1]

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class _Product(nn.Module):
    """Returns what the head has returned before."""

    rows: Tensor | None = None  # [1, N, V]

    def forward(self, hidden_states: Tensor) -> Any:
        return self.rows
