"""Memorizing over a kept context written down a second time: every key in a list, explicit masks and positions."""

import torch
from transformers import DynamicCache

from support.helpers import chunk_bounds


def angles(config, layer, positions, size):
    """cos and sin [n, pairs] float64 by the formula, from the config's numbers."""
    rope = config.rope_parameters
    rope = rope[config.layer_types[layer]] if "rope_theta" not in rope else rope
    pairs = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
    inverse = rope["rope_theta"] ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    if rope["rope_type"] == "linear":
        inverse = inverse / rope["factor"]
    phase = positions.double()[:, None] * inverse
    return phase.cos(), phase.sin()


def turn(keys, cos, sin, interleaved):
    """keys [1, H, n, D] turned pair by pair."""
    out, pairs = keys.clone(), cos.shape[-1]
    for pair in range(pairs):
        one, two = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        out[..., one] = keys[..., one] * cos[:, pair] - keys[..., two] * sin[:, pair]
        out[..., two] = keys[..., two] * cos[:, pair] + keys[..., one] * sin[:, pair]
    return out


class Explicit(DynamicCache):
    """Puts given rows before what a forward brings, and notes down what it brought."""

    def __init__(self, before):
        super().__init__()
        self.before, self.brought = before, {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.brought[layer_idx] = key_states.detach(), value_states.detach()
        keys, values = self.before[layer_idx] if self.before else (key_states[:, :, :0], value_states[:, :, :0])
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


class KeptOracle:
    """sliding: per layer how many inputs it sees, itself included, or None; turns: per layer whether its keys turn"""

    def __init__(self, model, window, sinks, interleaved=False, sliding=None, turns=None):
        self.model, self.window, self.sinks, self.interleaved = model, window, sinks, interleaved
        self.config = model.config
        layers = self.config.num_hidden_layers
        self.sliding, self.turns = sliding or [None] * layers, turns or [True] * layers
        self.history = {layer: None for layer in range(layers)}  # the rows of every input, as they were last computed
        self.first = {layer: None for layer in range(layers)}  # those of the text's first inputs
        self.tokens = torch.empty(0, dtype=torch.int64)

    def forward(self, ids, begin, numbers, before):
        """Logits of ids at positions from `begin` on, over rows `before` of the inputs `numbers` per layer."""
        queries = torch.arange(begin, begin + len(ids))
        masks = []
        for layer, reach in enumerate(self.sliding):
            keys = torch.cat([numbers[layer], queries])
            seen = keys[None] <= queries[:, None]
            if reach is not None:
                seen &= keys[None] > queries[:, None] - reach
            masks.append(torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None])
        types = getattr(self.config, "layer_types", None)
        by_type = {} if types is None else {kind: masks[types.index(kind)] for kind in types}
        cache = Explicit(before)
        logits = self.model(
            input_ids=ids[None],
            position_ids=queries[None],
            attention_mask=by_type if types is not None else masks[0],
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
        return logits, cache.brought

    def context(self, layer, begin, end):
        """Numbers (positions) and rows of what a layer sees of the inputs begin .. end - 1 of the window."""
        keys, values = self.history[layer]
        sinks = 0 if self.sliding[layer] is not None else min(self.sinks, end)
        numbers = torch.arange(begin, end)
        if begin == 0 or not sinks:
            return numbers, (keys[:, :, begin:end], values[:, :, begin:end])
        first_keys, first_values = (rows[:, :, :sinks] for rows in self.first[layer])
        if self.turns[layer]:
            moved = torch.full((sinks,), begin)
            first_keys = turn(first_keys, *angles(self.config, layer, moved, keys.shape[-1]), self.interleaved)
        keys = torch.cat([first_keys, keys[:, :, begin + sinks : end]], 2)
        return numbers, (keys, torch.cat([first_values, values[:, :, begin + sinks : end]], 2))

    def refresh(self, window_tokens):
        """Rows anew: of the inputs before the chunk, read as one text, and of the text's first ones."""
        begin = len(self.tokens) - len(window_tokens)
        none = [torch.empty(0, dtype=torch.int64)] * len(self.sliding)
        with torch.no_grad():
            _, rows = self.forward(window_tokens, begin, none, None)
            _, first = self.forward(self.tokens[: self.sinks], 0, none, None) if self.sinks else (None, rows)
        for layer in self.history:
            self.first[layer] = first[layer]
            for part, new in zip(self.history[layer], rows[layer], strict=True):
                part[:, :, begin:] = new

    def chunk(self, inputs, whole):
        """-> logits of the next inputs, and the rows they brought. whole: whether the window has just been read as one text."""
        seen, n = len(self.tokens), len(inputs)
        begin = max(0, seen + n + 1 - self.window)
        if not seen:
            return self.forward(inputs, 0, [torch.empty(0, dtype=torch.int64)] * len(self.sliding), None)
        if not whole:
            pairs = [self.context(layer, begin, seen) for layer in self.history]
        else:
            rows = [self.history[layer] for layer in self.history]
            pairs = [(torch.arange(begin, seen), (k[:, :, begin:], v[:, :, begin:])) for k, v in rows]
        numbers, rows = zip(*pairs, strict=True)
        return self.forward(inputs, seen, numbers, dict(enumerate(rows)))

    def keep(self, inputs, brought):
        for layer, rows in brought.items():
            old = self.history[layer] or [part[:, :, :0] for part in rows]
            self.history[layer] = [torch.cat(pair, 2) for pair in zip(old, rows, strict=True)]
            if len(self.tokens) < self.sinks:
                old = self.first[layer] or [part[:, :, :0] for part in rows]
                self.first[layer] = [torch.cat(pair, 2)[:, :, : self.sinks] for pair in zip(old, rows, strict=True)]
        self.tokens = torch.cat([self.tokens, inputs])


def plain_keep(plain, ids, window, stride, sinks=4, refresh_every=None, epochs=1, bos=None, **host):
    """The protocol of a kept context with a PlainMemory, or with a bare model, which learns nothing. -> the chunks' NLLs."""
    learns = hasattr(plain, "step")
    oracle, nlls, number = KeptOracle(plain.model if learns else plain, window, sinks, **host), [], 0
    for start, end in chunk_bounds(len(ids), stride):
        if end == 1:
            continue
        first = max(start, 1)
        inputs, targets, anew = ids[first - 1 : end - 1], ids[first:end], None
        if refresh_every is not None and number and number % refresh_every == 0:
            room = window if bos is None else window - 1
            anew = ids[max(0, end - room) : first - 1]
            anew = anew if bos is None else torch.cat([torch.tensor([bos]), anew])
        if bos is not None and not number:  # read before the text, as context: without a gradient
            with torch.no_grad():
                oracle.keep(torch.tensor([bos]), oracle.chunk(torch.tensor([bos]), False)[1])
        if anew is not None:
            oracle.refresh(anew)
        kept = None
        for epoch in range(epochs):
            logits, brought = oracle.chunk(inputs, anew is not None)
            kept = kept or brought
            nll = -logits[-len(targets) :].log_softmax(-1).gather(1, targets[:, None]).sum()
            if epoch == 0:
                nlls.append(nll.item())
            if learns:
                plain.step(nll / len(targets))
        oracle.keep(inputs, kept)
        number += 1
    return nlls
