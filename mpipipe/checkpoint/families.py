"""What differs between model families, as far as `config.json` tells or leaves unsaid.

How families name their sizes, which cannot run here and why, and what the scheduler must know of
their rotary embeddings. A new family adds its facts here. Seen in transformers 5.23's configuration
classes.

Without the table of refusals the first size that such a family calls otherwise, or does not have,
would be named as the reason. Families that state their sizes as others do, and are only not
declared to be divisible, are left to `models.families`: the transformers that is installed may know
more. What a loaded model shows of itself is refused there and in `models.verification`.

Phi-3's `generate` drops its cache when a sequence outgrows the original context, and computes all
of it again with the long factors of `longrope`. Other families with such factors go on with the
keys they have, and need nothing here: `models.rotary` decides what each token sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpipipe.errors import UnsupportedModelError

__all__ = [
    "ALIASES",
    "LEARNED_POSITIONS",
    "PLAIN_MLP",
    "RESTARTING",
    "TIED_BY_DEFAULT",
    "RotaryFacts",
    "read_rotary",
    "refusal",
    "refuse",
    "refuse_split",
    "split_refusal",
]

# Our name -> the names that families give it, most common first.
ALIASES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "expert_size": ("moe_intermediate_size",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "vocab_size": ("vocab_size",),
    "max_context_tokens": (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "seq_length",
    ),
}

# Families that look up a vector for each position: rows of that table beyond the context.
LEARNED_POSITIONS = {"opt": 2}

_PLAIN_MLP = """
    bloom codegen falcon gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj mpt nemotron opt
    persimmon phi starcoder2 xglm"""
_TIED_BY_DEFAULT = """
    bloom cohere cohere2 ernie4_5 falcon gemma gemma2 gemma3 gemma3_text gpt2 gpt_bigcode gpt_neo
    gpt_neox_japanese mpt opt recurrent_gemma smollm3 starcoder2 xglm"""
# Families whose feed-forward is one up and one down matrix.
PLAIN_MLP = frozenset(_PLAIN_MLP.split())
# Families that tie the LM head to the embedding when config.json is silent.
TIED_BY_DEFAULT = frozenset(_TIED_BY_DEFAULT.split())


_SUPPORTED = (
    "decoder-only models with attention in every layer whose family declares base_model_pp_plan "
    "in transformers (Llama, Mistral, Qwen2/3, Gemma, Phi-3, GPT-NeoX, OLMo, Granite, …), and OPT"
)

_ALIBI = "biases attention by distance (ALiBi), which our attention does not compute"
# Reason → model types of transformers.
_FAMILIES = {
    _ALIBI: "bloom mpt",
    "has states or convolutions between tokens (as Mamba, RWKV), not only attention": """
        bamba bailing_hybrid falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2
        lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text
        qwen3_next recurrent_gemma rwkv xlstm zamba zamba2""",
    "has a learned sink in the attention of each head, which ours does not compute": """
        flint gpt_oss granite_swa mimo_v2_flash""",
    "has keys and values of several sizes": """
        axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 youtu""",
    "chooses the keys that a token sees by what they hold": """
        axk2 deepseek_v32 deepseek_v4 doge glm_moe_dsa hy_v4""",
    "embeds positions, and declares no base_model_pp_plan, so nothing says how it can be split": """
        biogpt ctrl gpt2 gpt_bigcode gpt_neo gpt-sw3 imagegpt openai-gpt xglm""",
    "is an encoder: its tokens see later ones": """
        albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra
        ernie eurobert flaubert megatron-bert mobilebert modernbert mpnet nomic_bert rembert
        roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod""",
    "is the decoder of a model with an encoder": "bert-generation trocr",
    "has an encoder beside the decoder": """
        bart bigbird_pegasus blenderbot blenderbot-small bridgetower led longt5 m2m_100 marian
        mbart mt5 musicgen musicgen_melody mvp pegasus pegasus_x plbart prophetnet
        switch_transformers t5 t5gemma t5gemma2 udop umt5 whisper""",
    "generates in another way than token by token from left to right": "blt cpmant reformer xlnet",
    "has layers of several sizes": """
        gemma3n gemma3n_text gemma4_unified_text openelm""",
}
_REASON_OF = {kind: reason for reason, kinds in _FAMILIES.items() for kind in kinds.split()}


def refuse(model_type: str, why: str) -> UnsupportedModelError:
    """The error for a model of `model_type` that `why` (a verb phrase) rules out."""
    return UnsupportedModelError(
        f'the model family "{model_type}" cannot be split into stages: it {why}. '
        f"Supported are {_SUPPORTED}"
    )


def refuse_split(model_type: str, why: str) -> UnsupportedModelError:
    """The error for a model whose layers cannot be split over lanes: `why`, a clause."""
    return UnsupportedModelError(
        f'the layers of the model family "{model_type}" cannot be split over ranks: {why}; set '
        "pipeline.tensor_parallel = 1, and let the ranks be stages"
    )


def refusal(config: Mapping[str, object]) -> str:
    """Why a model with this `config.json` cannot run, as a verb phrase; empty: nothing is known."""
    model_type = config.get("model_type")
    if model_type == "falcon":
        return _ALIBI if config.get("alibi") else ""
    if config.get("is_encoder_decoder"):
        return "has an encoder beside the decoder"
    if not config.get("is_causal", True):
        return "lets tokens see later ones (is_causal is not true)"
    return _REASON_OF.get(str(model_type), "")


# Why lanes cannot share the layers of dense families, a clause → model types. Transformers' plans
# gather such results whole, which `models.tensor_split` does not do; it has the last word.
_SPLIT_REFUSALS = {
    "query, key and value are one matrix in it, as are gate and up": "phi3",
    "gate and up are one matrix in it": "glm glm4",
    "it normalises queries and keys over all heads together": "olmo2 olmo3",
}
_SPLIT_REFUSAL_OF = {
    kind: reason for reason, kinds in _SPLIT_REFUSALS.items() for kind in kinds.split()
}


def split_refusal(config: Mapping[str, object]) -> str:
    """Why lanes cannot share this model's layers, as a clause; empty: nothing is known.

    Mixtures of experts are told by their number.
    """
    model_type = str(config.get("model_type"))
    if model_type == "cohere" and config.get("use_qk_norm"):
        return "it normalises queries and keys with weights of each head's own (use_qk_norm)"
    return _SPLIT_REFUSAL_OF.get(model_type, "")


# model_type → original context of a file that does not state it, as in transformers' configuration.
RESTARTING = {"phi3": 4096}
_LONG = frozenset({"longrope", "su", "yarn"})  # Phi-3 reads the older two names as the first
_BY_LENGTH = frozenset({"longrope", "su", "dynamic"})
# Kinds that make a context longer by their factor: of what the file states as its positions, or of
# the original context that a `yarn` may state beside them, as vLLM reads them. Others state the
# longer one, and so do these families. A file with `linear` may do so too, which nothing tells
# (deepseek-coder): `memory.max_context_tokens` lowers it.
_STRETCHING = frozenset({"dynamic", "linear", "yarn"})
_STATED_STRETCHED = frozenset({"gemma3", "gemma3_text"})
_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RotaryFacts:
    """How a model's rotary embedding depends on the length of a sequence."""

    kind: str = "default"
    restart_tokens: int = 0  # with so many known tokens `generate` starts over; 0: never
    # Sequences that begin with at most so many tokens see the same at equal positions; None: all.
    max_equal_tokens: int | None = None
    # The context that its factor makes of the stated one; 0: it makes none longer.
    stretched_tokens: int = 0


def read_rotary(config: Mapping[str, object]) -> RotaryFacts:
    """The facts of a model's `config.json`."""
    kind, given = "default", []
    for name in ("rope_scaling", "rope_parameters"):  # transformers lets the former win
        parameters = config.get(name)
        if isinstance(parameters, Mapping) and parameters:
            kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
            # Some families have parameters for each type of layer.
            given = [parameters, *(p for p in parameters.values() if isinstance(p, Mapping))]
            break
    max_equal_tokens = _max_equal_tokens(config, given)
    original = RESTARTING.get(str(config.get("model_type")))
    if original is None or kind not in _LONG:
        stretched = _stretched(config, given[0], kind) if given else 0
        return RotaryFacts(kind, max_equal_tokens=max_equal_tokens, stretched_tokens=stretched)
    stated = _positive(config.get("original_max_position_embeddings"))
    original = stated or original
    return RotaryFacts("longrope", original + 1, original)


def _max_equal_tokens(
    config: Mapping[str, object], given: Sequence[Mapping[str, object]]
) -> int | None:
    """The least of the contexts that the file states, if frequencies depend on the length."""
    kinds = {str(parameters.get("rope_type") or parameters.get("type")) for parameters in given}
    if kinds.isdisjoint(_BY_LENGTH):
        return None
    names = ("original_max_position_embeddings", "max_position_embeddings")
    stated = [_positive(source.get(name)) for source in (config, *given) for name in names]
    return min(filter(None, stated), default=0)


def _stretched(config: Mapping[str, object], parameters: Mapping[str, object], kind: str) -> int:
    factor = parameters.get("factor")
    if kind not in _STRETCHING or config.get("model_type") in _STATED_STRETCHED:
        return 0
    if not isinstance(factor, int | float) or not 1 < factor <= _MAX_TOKENS:
        return 0
    stated = next(
        filter(None, (_positive(config.get(n)) for n in ALIASES["max_context_tokens"])), 0
    )
    original = stated
    if kind == "yarn":
        name = "original_max_position_embeddings"
        original = _positive(parameters.get(name)) or _positive(config.get(name)) or stated
    tokens = int(original * factor)
    return tokens if stated < tokens <= _MAX_TOKENS else 0


def _positive(value: object) -> int:
    """`value`, if it is a number of tokens; else 0."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return int(str(value)) if is_number else 0
