"""VisiPruner in plain NumPy, prompt by prompt: loops, float64, explicit attention weights and contributions.

It is an oracle: written from the algorithm's description, it shares no code with the package. The decoder is
a Llama, given as a dict of its weights under Hugging Face's names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Settings:
    """What is pruned; `boundary`, thresholds and stages as in the paper. No stages: the dense model."""

    boundary: int = 0
    layer_threshold: float = 0.995
    tokens_threshold: float = 0.2
    exit_threshold: float = 0.999
    exit_patience: int = 2
    stages: tuple[str, ...] = ()
    sink_rule: str = "first"


@dataclass
class Run:
    """What happened; positions are those of the prompt, layers count from 0."""

    fusion_layer: int | None = None
    kept: list[int] | None = None
    exit_layer: int | None = None
    tokens: list[int] = field(default_factory=list)  # entering each layer in prefill
    kv_lengths: list[int] = field(default_factory=list)  # of each layer after the last step
    hidden: list[Array] = field(default_factory=list)  # last prompt token after each layer [H]
    logits: list[Array] = field(default_factory=list)  # one a generated token [V]
    ids: list[int] = field(default_factory=list)
    margin: float = np.inf  # smallest distance of a compared number to its threshold


class ReferenceLlama:
    """A Llama decoder under VisiPruner.

    Args:
        weights: arrays by parameter name.
        heads, kv_heads, eps, theta: of the configuration.
    """

    def __init__(self, weights: dict[str, NDArray], *, heads: int, kv_heads: int, eps: float, theta: float):
        self.weights = {name: w.astype(np.float64) for name, w in weights.items()}
        self.heads, self.kv_heads, self.eps, self.theta = heads, kv_heads, eps, theta
        self.num_layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("model.layers."))

    def run(self, embeds: NDArray, vision: NDArray[np.bool_], settings: Settings, new_tokens: int) -> Run:
        """Prefill the prompt `embeds` `[N, H]` with vision tokens `vision` `[N]`, then decode greedily."""
        result = Run()
        prompt = len(embeds)
        keys: list[list[Array]] = []  # per layer, per head [K, D]
        values: list[list[Array]] = []

        x, positions = embeds.astype(np.float64), list(range(prompt))
        pruned, passes = False, 0
        for layer in range(self.num_layers):
            kept = result.kept
            if "middle" in settings.stages and kept is not None and not pruned:
                stay = [i for i, p in enumerate(positions) if not vision[p] or p in kept]
                x, positions, pruned = x[stay], [positions[i] for i in stay], True
                if not kept:
                    result.exit_layer = layer
            elif pruned and result.exit_layer is None and passes >= settings.exit_patience:
                stay = [i for i, p in enumerate(positions) if not vision[p]]
                x, positions = x[stay], [positions[i] for i in stay]
                result.exit_layer = layer
            result.tokens.append(len(positions))

            q, k, v = self._project(layer, x, positions)
            outputs, weights = [], []
            for head in range(self.heads):
                a = self._attention(q[head], k[head], causal=True)
                if "shallow" in settings.stages and layer < settings.boundary:
                    a = self._shallow(a, vision, layer, settings.sink_rule)
                weights.append(a)
                outputs.append(a @ v[head])
            o = np.concatenate(outputs, axis=-1)
            if "middle" in settings.stages and layer > settings.boundary:
                columns = [i for i, p in enumerate(positions) if vision[p]]
                removal = self._removal(o[-1], [a[-1] for a in weights], v, columns)
                if kept is None:
                    self._fuse(layer, removal, [positions[i] for i in columns], settings, result)
                elif "deep" in settings.stages and columns:
                    lowest = min(cosine for cosine, _ in removal)
                    result.margin = min(result.margin, abs(lowest - settings.exit_threshold))
                    passes += not lowest < settings.exit_threshold
            x = self._finish_layer(layer, x, o)
            keys.append(k)
            values.append(v)
            result.hidden.append(x[-1])

        for step in range(new_tokens):
            result.logits.append(self._logits(x[-1]))
            result.ids.append(int(result.logits[-1].argmax()))
            if step + 1 == new_tokens:
                break
            x = self.weights["model.embed_tokens.weight"][result.ids[-1]][None]
            for layer in range(self.num_layers):
                q, k, v = self._project(layer, x, [prompt + step])
                outputs = []
                for head in range(self.heads):
                    keys[layer][head] = np.concatenate([keys[layer][head], k[head]])
                    values[layer][head] = np.concatenate([values[layer][head], v[head]])
                    a = self._attention(q[head], keys[layer][head], causal=False)
                    outputs.append(a @ values[layer][head])
                x = self._finish_layer(layer, x, np.concatenate(outputs, axis=-1))
        result.kv_lengths = [len(k[0]) for k in keys]
        return result

    @staticmethod
    def _shallow(a: Array, vision: NDArray[np.bool_], layer: int, sink_rule: str) -> Array:
        """Attention weights `[N, N]` of one head under the shallow rule; nothing is renormalised."""
        a = a.copy()
        vision_columns = [i for i, is_vision in enumerate(vision) if is_vision]
        for row in range(len(a)):
            if not vision[row] and not vision[:row].any():
                continue  # text before the first image
            if layer > 0:
                if not vision[row]:
                    a[row, vision_columns] = 0
            elif vision[row]:
                a[row, vision_columns] = 0
            elif sink_rule == "first":
                mass = a[row, vision_columns].sum()
                a[row, vision_columns] = 0
                a[row, vision_columns[0]] = mass
            else:
                a[row, vision_columns[: len(vision_columns) // 2]] = 0
        return a

    @staticmethod
    def _removal(o: Array, a: list[Array], v: list[Array], columns: list[int]) -> list[tuple[float, float]]:
        """For each key column: cosine of `o` without its contribution to `o`, and the contribution's norm."""
        effects = []
        for i in columns:
            contribution = np.concatenate([a[head][i] * v[head][i] for head in range(len(v))])
            rest = o - contribution
            cosine = rest @ o / (np.linalg.norm(rest) * np.linalg.norm(o))
            effects.append((float(cosine), float(np.linalg.norm(contribution))))
        return effects

    @staticmethod
    def _fuse(
        layer: int, removal: list[tuple[float, float]], positions: list[int], settings: Settings, result: Run
    ) -> None:
        if not removal:
            return
        lowest = min(cosine for cosine, _ in removal)
        result.margin = min(result.margin, abs(lowest - settings.layer_threshold))
        if lowest < settings.layer_threshold:
            result.fusion_layer, result.kept = layer, []
            for position, (_, norm) in zip(positions, removal, strict=True):
                result.margin = min(result.margin, abs(norm - settings.tokens_threshold))
                if norm > settings.tokens_threshold:
                    result.kept.append(position)

    @staticmethod
    def _attention(q: Array, k: Array, *, causal: bool) -> Array:
        scores = q @ k.T / np.sqrt(q.shape[-1])
        if causal:
            for row in range(len(q)):
                scores[row, row + 1 :] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return scores / scores.sum(-1, keepdims=True)

    def _project(
        self, layer: int, x: Array, positions: list[int]
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Queries, keys (both rotated) and values of every query head, `[N, D]` each."""
        prefix = f"model.layers.{layer}."
        normed = self._norm(x, prefix + "input_layernorm.weight")
        q, k, v = (normed @ self.weights[f"{prefix}self_attn.{n}_proj.weight"].T for n in "qkv")
        dim = q.shape[-1] // self.heads
        group = self.heads // self.kv_heads
        queries, keys, values = [], [], []
        for head in range(self.heads):
            shared = head // group
            queries.append(self._rotate(q[:, head * dim : (head + 1) * dim], positions))
            keys.append(self._rotate(k[:, shared * dim : (shared + 1) * dim], positions))
            values.append(v[:, shared * dim : (shared + 1) * dim])
        return queries, keys, values

    def _rotate(self, x: Array, positions: list[int]) -> Array:
        half = x.shape[-1] // 2
        rotated = np.empty_like(x)
        for i in range(half):
            angle = np.array(positions) / self.theta ** (i / half)
            cos, sin = np.cos(angle), np.sin(angle)
            rotated[:, i] = x[:, i] * cos - x[:, i + half] * sin
            rotated[:, i + half] = x[:, i + half] * cos + x[:, i] * sin
        return rotated

    def _finish_layer(self, layer: int, x: Array, o: Array) -> Array:
        prefix = f"model.layers.{layer}."
        x = x + o @ self.weights[prefix + "self_attn.o_proj.weight"].T
        normed = self._norm(x, prefix + "post_attention_layernorm.weight")
        gate = normed @ self.weights[prefix + "mlp.gate_proj.weight"].T
        up = normed @ self.weights[prefix + "mlp.up_proj.weight"].T
        return x + (gate / (1 + np.exp(-gate)) * up) @ self.weights[prefix + "mlp.down_proj.weight"].T

    def _logits(self, x: Array) -> Array:
        return self._norm(x, "model.norm.weight") @ self.weights["lm_head.weight"].T

    def _norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weights[name]
