"""What a machine serves: how many requests at which context fit beside the weights, and how fast they run (roofline).

    room for the cache   devices x (memory - reserve) - weights - what is set aside for cached prompts
    a token's cache      kv_bytes_per_token / cut, on every device: with T ranks a device keeps kv_heads / T heads of
                         plain attention and the whole latent of MLA, so the latent of T ranks is stored T times
    decode step of B     max(weights read, products) + max(caches read, scores) + sums over the ranks
                         of the experts are read those that B tokens chose: E (1 - (1 - k / E)^B)
    prefill              FLOPs of the prompt / (T x peak x `matmul`), and the same sums

One replica is a group of `tensor` devices; what is left of the devices are further replicas.
"""

from dataclasses import dataclass

from hanlin.core.errors import HanlinError
from hanlin.models.config import ExpertsConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from hanlin.plan.devices import GIB, Cluster
from hanlin.plan.shares import Sizes
from hanlin.plan.step_time import Assumptions

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
SCALES = {"fp8": 4.0 / 128**2, "int8": 4.0 / 128, "int4": 2.0 / 128}  # bytes of scales beside a number
COMPUTE = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8", "int8": "bf16", "int4": "bf16"}
SERVING_RESERVE = 4.0 * GIB  # activations of a prefill, communication buffers, graphs


@dataclass(frozen=True)
class DecodeStep:
    """One token for each of `users`. Seconds by what they go to; the step is their sum."""

    users: int
    context: int
    weights: float
    cache: float
    links: float

    @property
    def seconds(self) -> float:
        return self.weights + self.cache + self.links

    @property
    def each(self) -> float:
        """Tokens/s of one user."""
        return 1.0 / self.seconds

    @property
    def total(self) -> float:
        """Tokens/s of all users of a replica."""
        return self.users / self.seconds


@dataclass(frozen=True)
class Service:
    """A machine with this model on it. Bytes are of one replica, all of its devices together.

    weights; set_aside: for cached prompts; room: for the caches of running requests; token: cache of a token over all
    devices of the replica; replicas, tensor: how the devices are used; dtype, cache_dtype: of weights and cache.
    """

    sizes: Sizes
    cluster: Cluster
    tensor: int
    replicas: int
    dtype: str
    cache_dtype: str
    weights: float
    set_aside: float
    room: float
    token: float
    reserve: float
    assumed: Assumptions

    @property
    def tokens(self) -> int:
        """That all caches of a replica hold."""
        return int(self.room // self.token)

    def users(self, context: int) -> int:
        """Requests of `context` tokens whose caches fit, over all replicas."""
        return self.tokens // context * self.replicas

    def decode(self, users: int, context: int) -> DecodeStep:
        """One decoding step of `users` requests in one replica, each with `context` tokens in its cache."""
        a, device, t = self.assumed, self.cluster.device, self.tensor
        peak, bandwidth = device.peak(COMPUTE[self.dtype]) * t, device.bandwidth * a.memory * t
        read = products = cache = scores = 0.0
        for kind, layer in enumerate(self.sizes.kinds):
            count = self.sizes.decoder.count(kind)
            numbers, multiplied = _read_numbers(self.sizes, kind, layer, users)
            read += count * numbers * _number_bytes(self.dtype)
            products += count * 2.0 * multiplied * users
            cache += (
                count
                * users
                * min(context, layer.attention.window or context)
                * _cache(layer, self.tensor, self.cache_dtype)
            )
            scores += count * users * _score_flops(layer, min(context, layer.attention.window or context))
        head = self.sizes.config.vocab_size * self.sizes.config.width
        read, products = read + head * 2.0, products + 2.0 * head * users
        weights = max(read / bandwidth, products / (peak * a.matmul * users / (users + a.small / 4)))
        compute = device.peak("bf16" if "bf16" in device.flops else "fp32") * t * a.matmul
        return DecodeStep(users, context, weights, max(cache / bandwidth, scores / compute), self._sums(users))

    def prefill(self, length: int) -> float:
        """Tokens/s of one replica that reads prompts of `length` tokens."""
        a, device = self.assumed, self.cluster.device
        peak = device.peak(COMPUTE[self.dtype]) * self.tensor
        flops = self.sizes.flops(length)
        decoder = sum(flops.kinds[k] for k in self.sizes.decoder) + flops.head / length
        return length / (decoder / (peak * a.matmul) + self._sums(length))

    def _sums(self, tokens: int) -> float:
        """Seconds of the two sums of each layer over the ranks."""
        if self.tensor == 1:
            return 0.0
        wire = 2 * (self.tensor - 1) / self.tensor * tokens * self.sizes.config.width * 2.0
        bandwidth = self.cluster.bandwidth(self.tensor) * self.assumed.link
        return 2 * len(self.sizes.decoder) * (wire / bandwidth + self.assumed.latency)


def serve(
    config: ModelConfig,
    cluster: Cluster,
    *,
    dtype: str = "bf16",
    cache_dtype: str = "bf16",
    tensor: int | None = None,
    set_aside: float = 0.0,
    reserve: float = SERVING_RESERVE,
    assumed: Assumptions | None = None,
) -> Service:
    """What `cluster` serves of this model. tensor: devices of a replica (None: the fewest that hold the weights and
    leave a quarter of them for caches, a divisor of the node, or whole nodes). set_aside: bytes of a replica that keep
    prompts for later. Weights that do not fit, dtypes without a name here, and models that do not decode, or that read
    the prompt in an encoder, are a `HanlinError`."""
    if config.head is None or not config.is_causal:
        raise HanlinError(f"{config.family} writes no text: it is an encoder, so there is no decoding to plan.")
    if config.encoder:
        raise HanlinError(f"{config.family} reads its prompt in an encoder; serving is planned for decoders only.")
    for given in (dtype, cache_dtype):
        if given not in BYTES:
            raise HanlinError(f"{given!r} is no dtype for serving; it is one of: {', '.join(BYTES)}.")
    sizes = Sizes(config)
    weights = weight_bytes(sizes, dtype)
    each = cluster.device.memory - reserve
    if tensor is None:
        fitting = [n for n in _groups(cluster) if n * each - weights - set_aside > 0.25 * weights]
        tensor = fitting[0] if fitting else cluster.world
    if tensor < 1 or cluster.world % tensor:
        raise HanlinError(f"{tensor} devices a replica do not divide the {cluster.world} of {cluster}.")
    room = tensor * each - weights - set_aside
    if room <= 0:
        raise HanlinError(
            f"{config.family} in {dtype} has {weights / 1e9:,.0f} GB of weights; {tensor} x {cluster.device.name} "
            f"leave {tensor * each / 1e9:,.0f} GB for weights and caches. Take more devices, or fewer bytes a weight."
        )
    token = sum(_cache(layer, tensor, cache_dtype) for layer in config.layers)
    return Service(
        sizes, cluster, tensor, cluster.world // tensor, dtype, cache_dtype, weights, set_aside, room, token,
        reserve, assumed or Assumptions(),
    )  # fmt: skip


def weight_bytes(sizes: Sizes, dtype: str, *, ahead: bool = False) -> float:
    """Of the matrices of the layers in `dtype` with its scales, of the rest (embedding, head, norms, routers) in 16
    bits. ahead: with the modules that predict further tokens, which a server may leave out."""
    ahead_numbers = sizes.config.parameters().parts.get("ahead", 0)
    rest = sizes.total - ahead_numbers - sizes.matrices
    wide = 4.0 if dtype == "fp32" else 2.0
    extra = ahead_numbers * _number_bytes(dtype) if ahead else 0.0
    return sizes.matrices * _number_bytes(dtype) + rest * wide + extra


def _number_bytes(dtype: str) -> float:
    return BYTES[dtype] + SCALES.get(dtype, 0.0)


def _cache(layer: LayerConfig, tensor: int, dtype: str) -> float:
    heads, key, value = layer.attention.kv_shape
    copies = tensor if isinstance(layer.attention, LatentAttentionConfig) else max(1.0, tensor / heads)
    return heads * (key + value) * BYTES[dtype] * copies


def _read_numbers(sizes: Sizes, kind: int, layer: LayerConfig, users: int) -> tuple[float, float]:
    """(numbers of weights that a step of `users` tokens reads in a layer, numbers that one token is multiplied by)."""
    size, f = sizes.layer[kind], layer.feed_forward
    if not isinstance(f, ExpertsConfig):
        return size.matrices, size.matrices
    rest = size.matrices - size.experts
    share = f.router.top_k / f.count
    return rest + size.experts * (1 - (1 - share) ** users), rest + size.experts * share


def _score_flops(layer: LayerConfig, context: int) -> float:
    """Of one new token that looks at `context`: the latent is read as it lies, with the products absorbed."""
    a = layer.attention
    if isinstance(a, LatentAttentionConfig):
        return 2.0 * a.heads * context * (2 * a.kv_rank + a.rope_dim)
    return 4.0 * a.heads * a.head_dim * context


def _groups(cluster: Cluster) -> list[int]:
    inside = [n for n in range(1, cluster.per_node + 1) if cluster.per_node % n == 0]
    return inside + [cluster.per_node * n for n in range(2, cluster.nodes + 1) if cluster.nodes % n == 0]
