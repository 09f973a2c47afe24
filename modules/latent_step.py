"""The new tokens of a forward pass over a `KIVILatentCache`: which are real, and where they stand in their rows."""

from dataclasses import dataclass, replace

import torch

from modules.cache.layer import LatentLayer
from modules.kernels import MAX_QUERY_LENGTH, Backend, add_latents
from modules.kernels.packed import NewTokens, Rope, counts_of_rows
from modules.kivi_cache import KIVILatentCache
from modules.quant_utils import require


class LatentSums:
    """What the members of a block share in a step: what they attend to, and the latents that they add to.

    `begin` at the first layer of a block, `enter` and `add` at each of them; the cache is given the sums at the last
    one.

    Attributes:
        history: The tokens that have latents, until the cache is given more; `None`: it is empty.
        sinks: Those that have none, keys and values of all members side by side.
        latents: By side of the cache `[B, L, Σ r]` float32.
        dense: By "keys" and "values", of each layer so far `[B, n, H_kv * d]`: the first n slots, which may be sinks.
    """

    def begin(self, layer: int, sink_slots: int, held: LatentLayer | None) -> None:
        """Start with no new tokens.

        Args:
            layer: The first layer of the block.
            sink_slots: Of the layers' own states those of so many first slots are kept.
            held: What the cache holds of the block; `None`: nothing.
        """
        self.history, self.sinks = None, ()
        if held is not None:
            self.history, self.sinks = held.packed(), held.sinks()
        self.latents, self.dense = {}, {"keys": [], "values": []}
        self._next, self._sink_slots = layer, sink_slots

    def enter(self, layer: int) -> None:
        """Raise a `ValueError` if a layer of the block before this one is missing."""
        if getattr(self, "_next", None) != layer:
            raise ValueError(
                f"layer_group_size: layer {layer} shares its latents with the layers before it, which are not computed "
                "in the same forward pass; a pipeline's stage must have whole blocks"
            )
        self._next += 1

    def add(self, sides: tuple[str, str], projections: tuple, states: tuple, backend: Backend | None) -> None:
        """Add what a layer gives.

        Args:
            sides: Side of the cache that holds the latents of its keys, and of its values.
            projections: What makes its parts of the two latents, `MemberBLinear`.
            states: Its keys and values `[B, L, H_kv * d]`.
            backend: That of the cache; `None`: it has not begun.
        """
        add_latents(backend, sides, projections, states, self.latents)
        for kept, state in zip(self.dense.values(), states, strict=True):
            # A copy, so that the tokens of a long prompt are not held till the block is complete.
            if self._sink_slots:
                kept.append(state.detach()[:, : self._sink_slots].clone())
            else:
                kept.append(state.new_empty((len(state), 0, state.shape[2])))

    def members(self) -> dict[str, torch.Tensor]:
        """The layers' own keys and values side by side, `[B, n, layers * H_kv * d]`, at the end of the block."""
        # A cache that grows must not find its old storage held.
        self.history, self.sinks = None, ()
        keys, values = self.dense.values()
        return {"keys": torch.cat(keys, dim=-1), "values": torch.cat(values, dim=-1)}


@dataclass(eq=False)
class LatentStep:
    """All that the layers must know about the new tokens of a forward pass.

    Attributes:
        positions: `[B, L]`, position of each token in its row; a pad has that of the token before it.
        real: `[B, L]` bool on the CPU, false for pads; `None`: no pads.
        start, count: `[B, 1]` int32, tokens that each row holds already, and new ones.
        order: `[B, L, 1]`, the row's tokens, then its pads; `None`: no pads.
        longest: Tokens of the longest row, the new ones included, where the host knows it.
        has_past: Whether the cache has been fed before.
        rope: Frequencies for the cached keys; by layer type, where layers have different ones.
        slots: `[B, past slots + L]`, position of the token in each slot, -1 for pads, if attention weights are to be
            returned; else `None`.
        sums: Latents that the layers of a block add to; `None`: the model has no blocks.
    """

    positions: torch.Tensor
    real: torch.Tensor | None
    start: torch.Tensor
    count: torch.Tensor
    order: torch.Tensor | None
    longest: int | None
    has_past: bool
    rope: Rope | dict[str, Rope] | None = None
    slots: torch.Tensor | None = None
    sums: LatentSums | None = None

    @classmethod
    def after(
        cls,
        cache: KIVILatentCache,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> "LatentStep":
        """New tokens, by their embeddings `[B, L, C]`, behind those that a cache holds.

        Raises:
            ValueError: The batch, mask or positions do not go on from the rows of the cache.
        """
        batch, length = embeds.shape[:2]
        lengths = cache.row_lengths()
        if len(lengths) == 0:
            lengths = [0] * batch
        if len(lengths) != batch:
            raise ValueError(
                f"input_ids: batch of {batch} must be the {len(lengths)} rows of the cache; batch_repeat_interleave(), "
                "batch_select_indices() and reset() change its rows"
            )
        real = _real_tokens(attention_mask, lengths, cache, length)
        # With a fixed capacity the device alone knows the lengths, and the first step is like the others.
        has_past = isinstance(lengths, torch.Tensor) or cache.get_seq_length() > 0
        step = cls.place(lengths, real, length, embeds.device, has_past=has_past)
        if position_ids is not None:
            step.check_positions(position_ids, lengths)
        return step

    @classmethod
    def place(
        cls, lengths: list[int] | torch.Tensor, real: torch.Tensor | None, length: int, device: torch.device, **fields
    ) -> "LatentStep":
        """New tokens behind those that the rows hold.

        Args:
            lengths: Tokens of each row; `[B]` on the device if the host does not know them.
            real: `[B, L]` bool on the CPU, false for pads; `None`: no pads.
            length: L.
            device: Where the tensors go.
            fields: `has_past`, `rope`, `slots`.
        """
        if isinstance(lengths, torch.Tensor):
            # The lengths stay on the device, for nothing may wait for them in a step that is captured.
            start, longest = lengths[:, None].to(device), None
        else:
            start, longest = counts_of_rows(tuple(lengths), device), max(lengths) + length
        if real is None:
            positions = start + torch.arange(length, dtype=torch.int64, device=device)
            return cls(positions, None, start, torch.full_like(start, length), None, longest, **fields)
        mask = real.to(device)
        # Pads take no position; the first pads of an empty row get 0.
        positions = (start + mask.cumsum(1) - 1).clamp(min=0)
        count = mask.sum(dim=1, keepdim=True, dtype=torch.int32)
        # A stable sort puts the pads of a row behind its tokens.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[..., None]
        return cls(positions, real, start, count, order, longest, **fields)

    def check_positions(self, position_ids: torch.Tensor, lengths: list[int] | torch.Tensor) -> None:
        """Reject other positions than those that follow from the `lengths` that the rows hold."""
        if position_ids.shape[-1] != self.positions.shape[1]:
            raise ValueError(
                f"position_ids: {tuple(position_ids.shape)} must be {tuple(self.positions.shape)}, as the new tokens"
            )
        held = "" if isinstance(lengths, torch.Tensor) else f", which holds {lengths} tokens"
        agrees = position_ids.to(self.positions.device) == self.positions
        if self.real is not None:
            # A pad may have any position.
            agrees = agrees | ~self.real.to(agrees.device)
        require(
            agrees.all(),
            "position_ids: must count the tokens of each row from 0 without gaps, pads not counted, and go on "
            f"where the cache ends{held}; leave them out to have them made",
        )

    def on(self, device: torch.device) -> "LatentStep":
        """The same step on the device of a layer."""
        if device == self.positions.device:
            return self
        if isinstance(self.rope, dict):
            moved = {"rope": {name: rope.on(device) for name, rope in self.rope.items()}}
        else:
            moved = {"rope": self.rope.on(device)}
        for name in ("positions", "start", "count", "order", "slots"):
            tensor = getattr(self, name)
            if tensor is not None:
                moved[name] = tensor.to(device)
        return replace(self, **moved)

    def new_tokens(self, keys: torch.Tensor, values: torch.Tensor) -> NewTokens:
        """The new tokens' latents `[B, L, C]` with where they stand."""
        return NewTokens(keys, values, self.start, self.count, self.real, self.order)

    def weights_by_slot(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention weights `[B, H, L, positions]` by slot, as the library gives them; zero for pads."""
        slots = self.slots[:, None, None].expand_as(weights)
        return weights.gather(3, slots.clamp(min=0)).masked_fill(slots < 0, 0.0)

    def slot_positions(self, cache: KIVILatentCache) -> torch.Tensor:
        """`[B, past slots + L]` position of the token in each slot of a cache and of the new tokens, -1 for pads."""
        mask = self.real
        if mask is None:
            mask = torch.ones(self.positions.shape, dtype=torch.bool, device="cpu")
        if cache.get_seq_length():
            mask = torch.cat([cache.held_slots(), mask], dim=1)
        return (mask.cumsum(1) - 1).masked_fill(~mask, -1)


def _real_tokens(attention_mask, lengths, cache: KIVILatentCache, length: int) -> torch.Tensor | None:
    """`[B, L]` on the CPU, true for the new slots that hold tokens; `None` if all do."""
    if attention_mask is None:
        return None
    if isinstance(lengths, torch.Tensor):
        if length <= MAX_QUERY_LENGTH:  # no wait, neither for the mask nor for the slots of the past
            real = (attention_mask[:, -length:] != 0).all()
            require(real, f"attention_mask: with a fixed capacity, steps of up to {MAX_QUERY_LENGTH} have no pads")
            return None
        lengths = lengths.tolist()
    # The mask covers the slots of the past too, as `generate` makes it.
    slots = cache.get_seq_length()
    expected, shape = (len(lengths), slots + length), type(attention_mask)
    if isinstance(attention_mask, torch.Tensor):
        shape = tuple(attention_mask.shape)
    if shape != expected:
        raise ValueError(
            f"attention_mask: {shape} must be [batch, past slots + new tokens] = {expected} with a "
            "KIVILatentCache; later turns pass the full mask"
        )
    mask = attention_mask != 0
    if length == 1 and mask.device.type != "cpu":
        # One token at a time on an accelerator: no wait for the mask, which must say that the tokens are real.
        require(mask[:, -1].all(), "attention_mask: a step of one token must not be a pad on an accelerator")
        return None
    mask = mask.cpu()
    if slots and not torch.equal(mask[:, :slots], cache.held_slots()):
        raise ValueError(
            f"attention_mask: its past part must mark the {lengths} tokens that the rows hold, and no others; "
            "cache.take_out(attention_mask) makes pads of tokens at the end of a row, crop() and reset() go back"
        )
    real = mask[:, slots:]
    if real.all():
        return None
    return real
