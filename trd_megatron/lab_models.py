"""The lab's models before pretraining: small Qwen3 of random weights, and the tokenizer of its 30 words."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trd_megatron.lab_text import EOS, NOTICE, PAD, RESPONSE, WORDS

# A corpus has sequences of up to 131 tokens: a refine prompt with a restarted attempt, and its target.
_QWEN3 = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}
STUDENT = _QWEN3 | {"hidden_size": 96, "head_dim": 24, "intermediate_size": 288, "seed": 1}
TEACHER = _QWEN3 | {"hidden_size": 144, "head_dim": 36, "intermediate_size": 432, "seed": 2}  # OPD's

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} "
    + f"{RESPONSE} {{{{ message['content'] }}}} {EOS}"
    + "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} "
    + f"{RESPONSE}{{% endif %}}"
)


def lab_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """One token a word; decode puts spaces between them. A word that is not in lab_text.WORDS is an error: there is no <unk>."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS)])
    backend.add_tokens([AddedToken(NOTICE, normalized=False)])  # one word, although it has spaces
    settings: dict[str, Any] = {"eos_token": EOS, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=model_max_length, clean_up_tokenization_spaces=False, **settings
    )
