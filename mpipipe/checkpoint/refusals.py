"""Model families that cannot run here, and why, told from `config.json` alone.

Without this table the first size that such a family calls otherwise, or does not have, would be
named as the reason. Families that state their sizes as others do, and are only not declared to be
divisible, are left to `models.families`: the transformers that is installed may know more. What a
loaded model shows of itself is refused there and in `models.verification`.
"""

from __future__ import annotations

from collections.abc import Mapping

from mpipipe.errors import UnsupportedModelError

__all__ = ["refusal", "refuse"]

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
        lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_next recurrent_gemma rwkv
        xlstm zamba zamba2""",
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
    "has layers of several sizes": "gemma3n gemma3n_text openelm",
}
_REASON_OF = {kind: reason for reason, kinds in _FAMILIES.items() for kind in kinds.split()}


def refuse(model_type: str, why: str) -> UnsupportedModelError:
    """The error for a model of `model_type` that `why` (a verb phrase) rules out."""
    return UnsupportedModelError(
        f'the model family "{model_type}" cannot be split into stages: it {why}. '
        f"Supported are {_SUPPORTED}"
    )


def refusal(config: Mapping[str, object]) -> str:
    """Why a model with this `config.json` cannot run, as a verb phrase; empty: nothing is known."""
    model_type = config.get("model_type")
    if model_type == "falcon":
        return _ALIBI if config.get("alibi") else ""
    if config.get("is_encoder_decoder"):
        return "has an encoder beside the decoder"
    return _REASON_OF.get(str(model_type), "")
