"""Memory-layer language models for `transformers`: one file that needs nothing but torch and transformers.

`memlm export` copies it into the folder of a model that no standard class expresses; load that with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

Memory and Memory+ (Memory Layers at Scale, arXiv 2412.09764), PEER (arXiv 2407.04153), retrieval and value
expansion of UltraMem (arXiv 2411.12364), Engram (arXiv 2601.07372) and mixtures of experts, over a decoder in
the style of Llama. Plain PyTorch, as in evaluation: tokens choose their experts, and no auxiliary loss is
added. A value table is never copied or converted as a whole, only the rows that tokens read.

Letters in shapes: B sequences, T positions, N = B * T tokens, D model dim, H heads, C half-key dim, R reads
of a head, L reads of a token, S rows of a table, V elements of a row, E experts.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

_NAMES = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _NAMES else "past_key_values"  # renamed in transformers 5; both are taken
_VALUES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
_CHUNK_ELEMENTS = 2_000_000  # of the rows that are gathered at once


class MemlmConfig(PretrainedConfig):
    """Configuration of an exported model.

    Args:
        memlm: The architecture as memlm stores it in checkpoints: sections transformer, memory and moe.
        vocab_size: Rows of the embedding.
        max_position_embeddings: Longest sequence in tokens that the model was trained with.
        values_format: How value tables are stored: float32, bfloat16, int8 or fp8 (both with a scale a row).
        engram_hashes: For each pool of an Engram the sizes of its tables and the multipliers of its hashes.
    """

    model_type = "memlm"
    keys_to_ignore_at_inference = [_CACHE]

    def __init__(
        self, memlm=None, vocab_size=257, max_position_embeddings=2048, values_format="float32",
        engram_hashes=None, use_cache=True, **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        if values_format not in _VALUES:
            raise ValueError(f"values_format is {values_format!r}; expected one of {', '.join(_VALUES)}")
        self.memlm = memlm or {"transformer": {"dim": 64, "layers": 2, "heads": 4}}
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.values_format, self.engram_hashes, self.use_cache = values_format, engram_hashes, use_cache
        decoder = self.memlm["transformer"]
        self.hidden_size, self.num_hidden_layers = decoder["dim"], decoder["layers"]
        self.num_attention_heads = decoder["heads"]
        self.num_key_value_heads = decoder.get("kv_heads") or self.num_attention_heads
        self.head_dim = decoder.get("head_dim") or self.hidden_size // self.num_attention_heads
        self.intermediate_size = decoder.get("feed_forward_dim") or -(-8 * self.hidden_size // 3 // 256) * 256
        self.tie_word_embeddings = decoder.get("tie_embeddings", False)


# -- attention


def rotary_table(positions, head_dim, theta, scaling):
    """Cosines and sines of positions [B, T], each [B, 1, T, head_dim] fp32."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = theta ** (-pairs / head_dim)
    size = 1.0
    if scaling is not None:
        slowed = _slowed(frequency, theta, scaling)
        frequency = frequency * (1 - slowed) + frequency / scaling["factor"] * slowed
        if scaling["kind"] == "yarn":
            size = 0.1 * math.log(scaling["factor"]) + 1
    angle = positions.float().unsqueeze(-1) * frequency
    angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
    return angle.cos() * size, angle.sin() * size


def _slowed(frequency, theta, scaling):
    """How much of its slowing down each pair of elements gets, from 0 to 1."""
    if scaling["kind"] == "linear":
        return torch.ones_like(frequency)
    slow = 1.0 if scaling.get("slow_turns") is None else scaling["slow_turns"]
    fast = scaling.get("fast_turns")
    fast = (4.0 if scaling["kind"] == "llama3" else 32.0) if fast is None else fast
    length = scaling["original_length"]
    if scaling["kind"] == "llama3":
        turns = length * frequency / (2 * math.pi)
        return ((fast - turns) / (fast - slow)).clamp(0, 1)
    head_dim = 2 * len(frequency)
    first, last = (
        head_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (fast, slow)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
    pair = torch.arange(len(frequency), dtype=torch.float32, device=frequency.device)
    return ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)


def rotate(x, table):
    """Turn each pair of elements of x [B, heads, T, head_dim] by its position's angle."""
    cos, sin = (part.to(x.dtype) for part in table)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def attention_mask_of(real, past, length):
    """Which of the past + T positions each of T queries attends to, [B, 1, T, past + T] bool; None: causal.

    A position of padding attends to itself, so that nothing is divided by a sum of zero.
    """
    if real is None and (past == 0 or length == 1):
        return None
    device = None if real is None else real.device
    own = torch.arange(past, past + length, device=device).unsqueeze(1)
    every = torch.arange(past + length, device=device)
    allowed = (every <= own).unsqueeze(0)
    if real is not None:
        allowed = (allowed & real.unsqueeze(1)) | (every == own)
    return allowed.unsqueeze(1)


class MemlmAttention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config, index):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.grouped = config.num_attention_heads != config.num_key_value_heads
        bias, dim = config.memlm["transformer"].get("attention_bias", False), config.hidden_size
        width, kv_width = (
            number * config.head_dim for number in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.query = nn.Linear(dim, width, bias=bias)
        self.key = nn.Linear(dim, kv_width, bias=bias)
        self.value = nn.Linear(dim, kv_width, bias=bias)
        self.output = nn.Linear(width, dim, bias=False)

    def forward(self, hidden, rotary, mask, cache):
        query, key, value = (
            linear(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        causal = mask is None and query.shape[2] > 1
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped
        )
        return self.output(output.transpose(1, 2).flatten(2))


# -- feed-forward networks


class MemlmFeedForward(nn.Module):
    """SwiGLU: silu(x W_gate) * (x W_up), times W_down."""

    def __init__(self, dim, width):
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, hidden):
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class MemlmExperts(nn.Module):
    """SwiGLU networks of which every token uses its top_k best, and shared ones that all use."""

    balance_bias: torch.Tensor | None

    def __init__(self, options, dim, feed_forward_dim):
        super().__init__()
        experts, width = options["experts"], options.get("expert_dim") or feed_forward_dim
        by_token = options["routing"] == "token_choice"
        self.top_k, self.score = options["top_k"], options["score"]
        self.normalise = by_token and options["normalise_weights"]
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, width))
        shared = options.get("shared_experts", 0)
        self.shared = MemlmFeedForward(dim, shared * width) if shared else None
        bias = torch.zeros(experts, dtype=torch.float32) if options.get("balance_rate") else None
        self.register_buffer("balance_bias", bias)

    def forward(self, hidden):
        tokens = hidden.flatten(0, -2)
        wide = torch.promote_types(tokens.dtype, torch.float32)
        logits = F.linear(tokens.to(wide), self.router.weight.to(wide))
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        order = scores if self.balance_bias is None else scores + self.balance_bias
        chosen = order.detach().topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        output = torch.zeros_like(tokens, dtype=wide)
        for expert in chosen.unique().tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[rows], self.gate_up[expert]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, self.down[expert])
            output = output.index_add(0, rows, result.to(wide) * weights[rows, place].unsqueeze(-1))
        output = output.to(hidden.dtype).view(hidden.shape)
        return output if self.shared is None else output + self.shared(hidden)


# -- value tables


class MemlmValues(nn.Module):
    """A value table [S, V], read by rows; quantised ones have a scale for each row."""

    def __init__(self, slots, dim, values_format):
        super().__init__()
        self.slots = slots
        values = torch.empty(slots, dim, dtype=_VALUES[values_format])
        if values_format in ("int8", "fp8"):
            self.register_buffer("values", values)
            self.register_buffer("scales", torch.empty(slots, dtype=torch.float32))
        else:
            self.values = nn.Parameter(values)
            self.scales = None

    def read(self, slots, weights):
        """Weighted sums [N, V] of the rows that tokens read: slots [N, L], weights [N, L]."""
        wide = torch.promote_types(weights.dtype, torch.float32)
        if self.values.dtype == wide:
            return F.embedding_bag(slots, self.values, per_sample_weights=weights.to(wide), mode="sum")
        sums = [
            torch.bmm(weights[part].to(wide).unsqueeze(1), self._rows(slots[part], wide)).squeeze(1)
            for part in self._parts(slots)
        ]
        # A bf16 table gives sums of its own precision, as it did in training.
        return torch.cat(sums).to(wide if self.scales is not None else self.values.dtype)

    def dot(self, slots, hidden):
        """Dot products [N, L] of each token [N, V] with the rows that it reads, fp32."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        products = [
            torch.bmm(self._rows(slots[part], wide), hidden[part].to(wide).unsqueeze(-1)).squeeze(-1)
            for part in self._parts(slots)
        ]
        return torch.cat(products)

    def _rows(self, slots, dtype):
        # Indexing knows no fp8: its bytes are gathered.
        stored = self.values
        rows = stored.view(torch.uint8)[slots].view(stored.dtype) if stored.itemsize == 1 else stored[slots]
        rows = rows.to(dtype)
        return rows if self.scales is None else rows * self.scales[slots].to(dtype).unsqueeze(-1)

    def _parts(self, slots):
        tokens = max(1, _CHUNK_ELEMENTS // max(1, slots.shape[1] * self.values.shape[1]))
        return [slice(start, start + tokens) for start in range(0, max(1, len(slots)), tokens)]


# -- memory layers


class MemlmQuery(nn.Module):
    """Queries [N, H, 2, C] of hidden states [N, D]: a linear map, then perhaps a norm."""

    def __init__(self, dim, heads, half_key_dim, norm):
        super().__init__()
        self.shape = (heads, 2, half_key_dim)
        width = heads * 2 * half_key_dim
        self.linear = nn.Linear(dim, width)
        self.batch_norm = nn.BatchNorm1d(width) if norm == "batch" else None
        self.qk_gain = nn.Parameter(torch.empty(heads, 2, 1)) if norm == "qk" else None

    def forward(self, hidden):
        query = self.linear(hidden)
        if self.batch_norm is not None:
            query = self.batch_norm(query)
        query = query.unflatten(-1, self.shape)
        return query if self.qk_gain is None else F.rms_norm(query, self.shape[-1:]) * self.qk_gain


class MemlmKeys(nn.Module):
    """Half keys of every head, and the search for the R best slots; with a core, Tucker's retrieval."""

    def __init__(self, heads, half_keys, half_key_dim, reads, tucker):
        super().__init__()
        self.half_keys, self.reads = tuple(half_keys), reads
        self.rank = None if tucker is None else tucker["rank"]
        self.keys = nn.Parameter(torch.empty(heads, sum(half_keys), half_key_dim))
        if self.rank is not None:
            self.core = nn.Parameter(torch.empty(heads, self.rank, self.rank))

    def forward(self, query, normalise):
        """Slots and scores [N, H, R] for queries [N, H, 2, C]; half keys are normalised as queries are."""
        keys = F.rms_norm(self.keys, self.keys.shape[-1:]) if normalise else self.keys
        halves = keys.to(query.dtype).split(self.half_keys, dim=1)
        return self._by_sums(query, halves) if self.rank is None else self._by_core(query, halves)

    def _by_sums(self, query, halves):
        """The score of a slot is the sum of its half scores; the best lie among the best of each half."""
        wide = torch.promote_types(query.dtype, torch.float32)
        (first, left), (second, right) = (
            torch.einsum("nhc,hkc->nhk", query[:, :, half], keys).to(wide).topk(self.reads)
            for half, keys in enumerate(halves)
        )
        scores, chosen = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2).topk(self.reads)
        return self._slots(left, right, chosen), scores

    def _by_core(self, query, halves):
        """Half scores have r parts, joined by the core; its leading singular vectors preselect."""
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query.unflatten(-1, (self.rank, -1))
        core = self.core.to(wide)
        left_vectors, _, right_vectors = torch.linalg.svd(core.detach())
        u, t = left_vectors[..., 0], right_vectors[..., 0, :]
        sign = torch.where((u + t).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        found = []
        for half, (keys, vector) in enumerate(zip(halves, (u * sign, t * sign), strict=True)):
            parts = keys.unflatten(-1, (self.rank, -1))
            scores = torch.einsum("nhrc,hkrc->nhrk", query[:, :, half], parts).to(wide)
            order = torch.einsum("nhrk,hr->nhk", scores.detach(), vector).topk(self.reads).indices
            found.append((scores.gather(-1, order.unsqueeze(2).expand(-1, -1, scores.shape[2], -1)), order))
        (a, left), (b, right) = found
        scores, chosen = torch.einsum("nhri,hrs,nhsj->nhij", a, core, b).flatten(-2).topk(self.reads)
        return self._slots(left, right, chosen), scores

    def _slots(self, left, right, chosen):
        first = left.gather(-1, chosen // self.reads)
        return first * self.half_keys[1] + right.gather(-1, chosen % self.reads)


class MemlmMemory(nn.Module):
    """Query, product keys, read, gate, projection; with pre-values every slot is an expert of one neuron."""

    def __init__(self, options, dim):
        super().__init__()
        half_key_dim = (options.get("key_dim") or dim // 2) // 2
        value_dim = options.get("value_dim") or dim
        self.expansion = options["value_expansion"]
        self.query = MemlmQuery(dim, options["heads"], half_key_dim, options["query_norm"])
        self.product_keys = MemlmKeys(
            options["heads"], key_grid(options), half_key_dim, options["reads"], options.get("tucker")
        )
        kind = options["pre_values"]
        self.activation = None if kind == "none" else _ACTIVATIONS[kind]()
        self.gate = nn.Linear(dim, value_dim) if options["gate"] == "silu" else None
        self.projection = nn.Linear(value_dim * self.expansion, dim) if options["projection"] else None

    def forward(self, hidden, pools, _):
        values, tokens = pools[0], hidden.flatten(0, -2)
        slots, scores = self.product_keys(self.query(tokens), normalise=self.query.qk_gain is not None)
        weights = scores.softmax(-1).flatten(1)
        slots = slots.flatten(1)
        rows = slots % values.slots
        if self.activation is not None:
            weights = weights * self.activation(pools[1].dot(rows, tokens))
        if self.expansion == 1:
            output = values.read(rows, weights)
        else:  # virtual tables over the same rows, each read apart
            tables = slots // values.slots
            parts = [values.read(rows, weights * (tables == i)) for i in range(self.expansion)]
            output = torch.stack(parts, dim=1)
        if self.gate is not None:
            gate = F.silu(self.gate(tokens))
            output = output * (gate if self.expansion == 1 else gate.unsqueeze(1))
        output = output.flatten(1).to(hidden.dtype)
        if self.projection is not None:
            output = self.projection(output)
        return output.view_as(hidden)


def key_grid(options):
    """Half keys in the two sets of a head."""
    half_keys = options["half_keys"]
    return (half_keys, half_keys) if isinstance(half_keys, int) else tuple(half_keys)


# -- Engram


class MemlmConvolution(nn.Module):
    """A causal convolution over positions, each channel by itself: weight [taps, D]."""

    def __init__(self, dim, taps, dilation):
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(taps, dim))

    @property
    def reach(self):
        """How many positions it looks back."""
        return (len(self.weight) - 1) * self.dilation

    def forward(self, x, length):
        """Of the last `length` positions of x [B, any, D]; what lies before x counts as zero."""
        x = F.pad(x, (0, 0, max(0, length + self.reach - x.shape[1]), 0))
        end = x.shape[1]
        output = 0.0
        for tap, weight in enumerate(self.weight):
            back = tap * self.dilation
            output = output + x[:, end - back - length : end - back] * weight
        return output


class MemlmEngram(nn.Module):
    """Reads the rows of each token's n-grams, and lets the hidden state decide how much of them to add."""

    def __init__(self, options, dim, hashes, place):
        super().__init__()
        tables = len(options["orders"]) * options["heads"]
        width = tables * engram_value_dim(options, dim)
        self.sizes, self.multipliers = hashes["sizes"], hashes["multipliers"]
        self.place = place  # of its convolution's inputs in the cache
        self.key = nn.Linear(width, dim, bias=False)
        self.value = nn.Linear(width, dim, bias=False)
        self.hidden_norm, self.key_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        wanted = options["convolution"]
        self.convolution_norm = nn.RMSNorm(dim, eps=1e-6) if wanted else None
        self.convolution = MemlmConvolution(dim, 4, max(options["orders"])) if wanted else None

    def slots(self, ids, length):
        """Slots [B * length, G] of the n-grams ending at the last `length` of ids [B, any]; 0 is no token."""
        sizes = torch.tensor(self.sizes, device=ids.device)
        ids = F.pad(ids, (max(0, length + len(self.multipliers) - 1 - ids.shape[1]), 0)).unsqueeze(-1)
        end, mixed = ids.shape[1], torch.zeros((), dtype=torch.long, device=ids.device)
        for back, multipliers in enumerate(self.multipliers):
            mixed = mixed ^ (ids[:, end - back - length : end - back] * ids.new_tensor(multipliers))
        mixed = (mixed >> 31) ^ ((mixed & (2**31 - 1)) * 0x7FEB352D)
        return (mixed % sizes + sizes.cumsum(0) - sizes).flatten(0, 1)

    def forward(self, hidden, pools, inputs):
        ids, real, cache = inputs
        length = hidden.shape[1]
        slots = self.slots(ids, length).view(-1, 1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = pools[0].read(slots, torch.ones_like(slots, dtype=wide))
        memory = rows.view(*hidden.shape[:-1], -1).to(hidden.dtype)
        logit = (self.hidden_norm(hidden) * self.key_norm(self.key(memory))).sum(-1, keepdim=True, dtype=wide)
        output = (logit * hidden.shape[-1] ** -0.5).sigmoid().to(hidden.dtype) * self.value(memory)
        if self.convolution is not None and self.convolution_norm is not None:
            x = self.convolution_norm(output)
            if real is not None:
                x = x * real[:, -length:].unsqueeze(-1)
            if cache is not None:
                x = remember(cache, self.place, x)
            output = output + F.silu(self.convolution(x, length))
        return output.to(hidden.dtype)


def engram_value_dim(options, dim):
    """Elements of a row."""
    tables = len(options["orders"]) * options["heads"]
    return options.get("value_dim") or max(dim // tables // 8 * 8, 8)


def remember(cache, place, x):
    """Append x [B, T, any] to a further layer of the cache, which beams move too, and give all it holds."""
    if hasattr(cache, "layers"):
        from transformers.cache_utils import DynamicLayer  # as old as the attribute

        while len(cache.layers) <= place:
            cache.layers.append(DynamicLayer())
    x = x.unsqueeze(1)
    return cache.update(x, x[..., :1], place)[0].squeeze(1)


# -- the decoder


class MemlmBlock(nn.Module):
    """Attention, then a feed-forward network or experts; memory replaces or joins it, or comes first."""

    def __init__(self, config, index, feed_forward, memory, mode, pools):
        super().__init__()
        eps = config.memlm["transformer"].get("norm_eps", 1e-5)
        self.mode, self.pool_names = mode, pools
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=eps)
        self.attention = MemlmAttention(config, index)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=eps)
        self.feed_forward, self.memory = feed_forward, memory

    def forward(self, hidden, rotary, mask, pools, inputs):
        own = [pools[name] for name in self.pool_names]
        if self.mode == "before":
            hidden = hidden + self.memory(hidden, own, inputs)
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary, mask, inputs[2])
        normed = self.feed_forward_norm(hidden)
        if self.feed_forward is not None:
            hidden = hidden + self.feed_forward(normed)
        if self.mode in ("replace", "beside"):
            hidden = hidden + self.memory(normed, own, inputs)
        return hidden


class MemlmModel(nn.Module):
    """Embedding, blocks, norm, output layer, and the pools of values that blocks read by name."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, depth = config.hidden_size, config.num_hidden_layers
        memory, moe = config.memlm.get("memory"), config.memlm.get("moe")
        self.engram = memory is not None and "orders" in memory
        pool_of = placed_pools(memory, depth) if memory else {}
        mode = "before" if self.engram else (memory or {}).get("mode", "none")
        self.pools = nn.ModuleDict()
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.blocks = nn.ModuleList()
        for index in range(depth):
            layer, names, feed_forward = None, [], None
            if index in pool_of:
                layer, names = self._memory(memory, dim, pool_of[index], depth + 1 + index)
            if layer is None or mode != "replace":
                in_place = moe is not None and (moe.get("layers") is None or index in moe["layers"])
                width = config.intermediate_size
                feed_forward = MemlmExperts(moe, dim, width) if in_place else MemlmFeedForward(dim, width)
            own_mode = "none" if layer is None else mode
            self.blocks.append(MemlmBlock(config, index, feed_forward, layer, own_mode, names))
        self.norm = nn.RMSNorm(dim, eps=config.memlm["transformer"].get("norm_eps", 1e-5))
        self.output = nn.Linear(dim, config.vocab_size, bias=False)

    def _memory(self, options, dim, pool, place):
        """A layer, and the names of the pools that it reads; they are made with their first layer."""
        layer: nn.Module
        if self.engram:
            hashes = self.config.engram_hashes[pool]
            layer = MemlmEngram(options, dim, hashes, place)
            sizes = {pool: (sum(hashes["sizes"]), engram_value_dim(options, dim))}
        else:
            layer = MemlmMemory(options, dim)
            slots = math.prod(key_grid(options)) // options["value_expansion"]
            sizes = {pool: (slots, options.get("value_dim") or dim)}
            if options["pre_values"] != "none":
                sizes[f"{pool}_down"] = (slots, dim)
        for name, size in sizes.items():
            if name not in self.pools:
                self.pools[name] = MemlmValues(*size, self.config.values_format)
        return layer, list(sizes)

    def forward(self, tokens, real, positions, cache):
        """Hidden states [B, T, D] before the blocks, after each of them, and after the norm for the last."""
        past = 0 if cache is None else cache.get_seq_length()
        decoder, length = self.config.memlm["transformer"], tokens.shape[1]
        theta, scaling = decoder.get("rope_theta", 10_000.0), decoder.get("rope_scaling")
        rotary = rotary_table(positions, self.config.head_dim, theta, scaling)
        mask = attention_mask_of(real, past, length)
        mask = mask if mask is None else mask.to(tokens.device)
        ids = None
        if self.engram:
            ids = tokens + 1 if real is None else (tokens + 1) * real[:, past:]
            if cache is not None:
                ids = remember(cache, self.config.num_hidden_layers, ids.unsqueeze(-1)).squeeze(-1)
        hidden = self.embedding(tokens)
        states = [hidden]
        for block in self.blocks:
            hidden = block(hidden, rotary, mask, self.pools, (ids, real, cache))
            states.append(hidden)
        states[-1] = self.norm(hidden)
        return states


def placed_pools(options, depth):
    """Name of the pool of each block that holds memory."""
    engram = "orders" in options
    blocks, count, stride = options.get("layers"), options["count"], options["stride"]
    if blocks is None:
        first = 1 if engram else (depth - (count - 1) * stride) // 2
        blocks = [first + i * stride for i in range(count)]
    names = options.get("layer_pools") or [f"block{i}" if engram else "main" for i in blocks]
    return dict(zip(blocks, names, strict=True))


class MemlmForCausalLM(PreTrainedModel, GenerationMixin):
    """Next-token logits, losses and generation."""

    config_class = MemlmConfig
    base_model_prefix = "model"
    _no_split_modules = ["MemlmBlock"]
    _tied_weights_keys = {"model.output.weight": "model.embedding.weight"}
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config):
        super().__init__(config)
        self.model = MemlmModel(config)
        self.post_init()

    def _init_weights(self, module):
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if "Norm" in type(module).__name__ or name == "qk_gain":
                nn.init.constant_(parameter, 0.0 if name == "bias" else 1.0)
            elif name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def get_output_embeddings(self):
        return self.model.output

    def set_output_embeddings(self, new_embeddings):
        self.model.output = new_embeddings

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, labels=None, use_cache=None,
        output_hidden_states=None, return_dict=None, logits_to_keep=0, num_items_in_batch=None,
        past_key_values=None, **kwargs,
    ):  # fmt: skip
        """Logits [B, T, vocab].

        Args:
            input_ids: [B, T].
            attention_mask: [B, cached + T], 0 at positions of padding.
            position_ids: [B, T]; by default they go on from the cache's.
            cache: A DynamicCache of the tokens before these; `past_key_values` until transformers 5.
            labels: [B, T], the tokens themselves, -100 where no loss is counted; they are shifted here.
            logits_to_keep: Only the last so many positions, or those of a tensor; 0: all.
            num_items_in_batch: Labels that the summed loss is divided by, instead of those given here.
        """
        for name in ("inputs_embeds", "output_attentions"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{name} is not supported by {type(self).__name__}")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                "attention_mask must be [B, T]; static caches, which need [B, 1, T, T], are not supported"
            )
        past, length = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        real = None
        if attention_mask is not None and not bool(attention_mask.all()):
            real = attention_mask.bool()
        if position_ids is None:  # only distances matter: padding before a text changes nothing
            position_ids = torch.arange(past, past + length, device=input_ids.device).unsqueeze(0)
        states = self.model(input_ids, real, position_ids, cache)
        hidden = states[-1]
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.model.output(hidden)
        loss = None
        if labels is not None:
            targets, counted = labels[:, 1:].flatten(), num_items_in_batch
            if counted is None:
                counted = (targets != -100).sum().clamp(min=1)
            # fp32: a sum over tokens
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum") / counted
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=tuple(states) if wanted else None, **{_CACHE: cache}
        )
        return output.to_tuple() if return_dict is False else output
