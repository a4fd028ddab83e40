"""A small LLaMA in plain PyTorch, to be read in one sitting.

The architecture is that of Touvron et al. 2023 (arXiv 2302.13971), with the grouped-query attention of Llama 2
(arXiv 2307.09288). Module and parameter names equal those of Hugging Face's `LlamaForCausalLM`, so a state dict loads
as it is and `target_modules` means the same here and in peft.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""The label of a position that does not count in the loss, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LLaMA; the field names are those of Hugging Face's `config.json`.

    Raises:
        ValueError: if a size is not positive, or the heads do not divide the hidden size or each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "tie_word_embeddings" and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads do not divide into {self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"a head has {self.head_dim} features: RoPE turns them in pairs and needs an even number")

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads


PRESETS = {
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    ),
    "LLaMA-7B": LlamaConfig(
        vocab_size=32_000,
        hidden_size=4_096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        rms_norm_eps=1e-6,
    ),
    "LLaMA-13B": LlamaConfig(
        vocab_size=32_000,
        hidden_size=5_120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        rms_norm_eps=1e-6,
    ),
    "LLaMA-65B": LlamaConfig(
        vocab_size=32_000,
        hidden_size=8_192,
        intermediate_size=22_016,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
    ),
    "Llama-2-70B": LlamaConfig(
        vocab_size=32_000,
        hidden_size=8_192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
"""Configs by name. `tiny` is for checks on random weights; the others are the published sizes."""

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear layers of a decoder layer, by their own names, as peft's `target_modules` takes them."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean square taken in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(
    positions: Int[Tensor, "*batch seq"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "*batch seq head_dim"], Float[Tensor, "*batch seq head_dim"]]:
    """Return cos and sin, in fp32, of the angle by which RoPE turns each feature at each position.

    Feature i is paired with feature i + head_dim / 2, and the pair turns by position * theta^(-2i / head_dim)
    (Su et al. 2021, arXiv 2104.09864, section 3.2.2, in Hugging Face's order of features).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[..., None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"],
    cos: Float[Tensor, "*#batch seq head_dim"],
    sin: Float[Tensor, "*#batch seq head_dim"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn every pair of features of queries or keys by its angle: the same in all rows, or (batch, 1, seq, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KeyValueCache:
    """The keys and values that one layer has computed so far, so that the next token needs only its own.

    Attributes:
        keys, values: of shape (batch, key-value heads, tokens so far, head_dim), the keys turned by RoPE; None at the start.
    """

    def __init__(self):
        self.keys: Float[Tensor, "batch heads seq head_dim"] | None = None
        self.values: Float[Tensor, "batch heads seq head_dim"] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; return those of all tokens so far."""
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class LlamaAttention(nn.Module):
    """Causal self-attention in which several query heads share one key-value head (GQA, arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "*#batch seq head_dim"],
        sin: Float[Tensor, "*#batch seq head_dim"],
        mask: Bool[Tensor, "batch 1 seq all"] | None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Mix the values of earlier tokens, also of those in the cache, as far as the mask admits them."""
        batch, seq, _ = x.shape
        queries, keys, values = (
            projection(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq hidden"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each normed before and added to the residual stream after."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        cos: Float[Tensor, "*#batch seq head_dim"],
        sin: Float[Tensor, "*#batch seq head_dim"],
        mask: Bool[Tensor, "batch 1 seq all"] | None,
        *cache: KeyValueCache,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Add to each token's vector what attention makes of it, then what the MLP makes of the sum.

        A cache is handed on if there is one: an attention of another make need not know of it.
        """
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, *cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm: token ids in, hidden states out.

    Set `gradient_checkpointing` to keep only each layer's input during training and compute the rest again in backward.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq hidden"]:
        return self.run_layers(self.embed_tokens(input_ids), attention_mask)

    def run_layers(
        self,
        x: Float[Tensor, "batch seq hidden"],
        attention_mask: Int[Tensor, "batch all"] | None = None,
        positions: Int[Tensor, "*batch seq"] | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the hidden states for embeddings, which need not be those of any token.

        Args:
            attention_mask: of all tokens, also of those whose keys and values are in the caches; needed with caches.
            positions: by which RoPE turns queries and keys, the same in all rows, shaped (seq,), or each row's own. By
                default 0, 1, 2 and so on. Only differences between positions matter.
            caches: one a layer, which the layer reads and extends.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]  # the same for all heads
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        mask = None if attention_mask is None else causal_mask(attention_mask)[:, :, -x.shape[1] :]
        for number, layer in enumerate(self.layers):
            if caches is not None:
                x = layer(x, cos, sin, mask, caches[number])
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask)
        return self.norm(x)


def set_gradient_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Turn gradient checkpointing on or off in the `LlamaModel` that is, or lies somewhere in, `model`."""
    for module in model.modules():
        if isinstance(module, LlamaModel):
            module.gradient_checkpointing = enabled


class Llama(nn.Module):
    """A LLaMA with its language-model head. Weights start as in Hugging Face's: N(0, 0.02^2), norms at one."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's own tensor, not a copy of it, if the config ties the two."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return the logits of the next token at every position.

        Args:
            input_ids: token ids.
            attention_mask: 1 for a token, 0 for padding on either side. A batch padded on the right needs none: no
                token looks at what follows it.
        """
        return self.lm_head(self.model(input_ids, attention_mask))


def causal_mask(attention_mask: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch 1 seq seq"]:
    """Return True where a query (row) may look at a key (column): earlier tokens that are not padding, and itself.

    Padding may look at itself, so that no row is empty: a softmax over nothing is NaN.
    """
    seq = attention_mask.shape[1]
    earlier = torch.ones(seq, seq, dtype=torch.bool, device=attention_mask.device).tril()
    itself = torch.eye(seq, dtype=torch.bool, device=attention_mask.device)
    tokens = attention_mask.bool()[:, None, None, :]
    return earlier & tokens | itself


def causal_loss(
    model: Llama,
    input_ids: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy, in nats per token, of the labels given the tokens before them.

    Equals Hugging Face's `model(input_ids, labels=labels).loss`, but the head runs only where there is a label: with a
    vocabulary of 49,152, a prompt's unused logits would be the largest tensor of the training step.

    Args:
        labels: `input_ids` where the token is to be learned, `IGNORE` elsewhere; position t is predicted from t - 1.
    """
    hidden = model.model(input_ids, attention_mask)[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORE
    logits = model.lm_head(hidden[counted])
    return F.cross_entropy(logits.float(), targets[counted])


@torch.no_grad()
def generate(
    model: Llama,
    input_ids: Int[Tensor, "batch seq"],
    max_new_tokens: int,
    stop_token: int | None = None,
    *,
    attention_mask: Int[Tensor, "batch seq"] | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch longer"]:
    """Extend every row of a batch, one token at a time, with a cache of keys and values.

    A row ends with `stop_token`, and is filled up with it while others go on; the loop ends when all rows have ended.

    Args:
        attention_mask: 1 for a token, 0 for padding, which has to stand on the left: a row goes on where it ends.
        temperature: 0 takes the likeliest token. Otherwise a token is drawn with probabilities softmax(logits / temperature).
        generator: of the random numbers, on the model's device.

    Raises:
        ValueError: if a row is padded on the right.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not attention_mask[:, -1].all():
        raise ValueError("padding has to stand on the left: the last position of every row is a token")
    caches = [KeyValueCache() for _ in model.model.layers]
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # a row's first token is at 0, wherever it stands
    running = torch.ones_like(input_ids[:, -1:], dtype=torch.bool)
    new = input_ids
    for _ in range(max_new_tokens):
        hidden = model.model.run_layers(model.model.embed_tokens(new), attention_mask, positions, caches)
        new = _pick(model.lm_head(hidden[:, -1]), temperature, generator)
        if stop_token is not None:
            new = torch.where(running, new, stop_token)
            running = running & (new != stop_token)
        input_ids = torch.cat([input_ids, new], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)
        positions = positions[:, -1:] + 1
        if not running.any():
            break
    return input_ids


def _pick(
    logits: Float[Tensor, "batch vocab"], temperature: float, generator: torch.Generator | None
) -> Int[Tensor, "batch 1"]:
    """Return each row's next token: the likeliest at temperature 0, otherwise a random one."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
