"""The lab's tokenizer through the pipeline's own Chat, and the settings of its models."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from trd_megatron import lab_models, lab_text
from trd_megatron.chat import Chat
from trd_megatron.data.lab import STUDENT_MIX, TEACHER_MIX, WORLDS, corpus
from trd_megatron.errors import UserError
from trd_megatron.prompts import TRUNCATED


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    lab_models.lab_tokenizer(256).save_pretrained(folder)
    return Chat(folder, "chat", {})


def test_thirty_words_with_their_ids_in_order(chat):
    assert chat.vocabulary() == {word: index for index, word in enumerate(lab_text.WORDS)}
    assert len(set(lab_text.WORDS)) == 30


def test_a_prompt_ends_with_the_word_after_which_the_response_starts(chat):
    prompt = lab_text.student_prompt("9 s1 # 10 s2 * 9 s3 - 3")
    assert chat.decode(chat.prompt_ids(prompt), special=True) == "P 9 s1 # 10 s2 * 9 s3 - 3 A"


@given(st.lists(st.sampled_from(lab_text.WORDS), min_size=1))
def test_decode_gives_the_words_back(chat, words):
    ids = [lab_text.WORDS.index(word) for word in words]
    text = chat.decode(ids, special=True)
    assert text == " ".join(words)
    assert chat.encode(text) == ids
    special = (lab_text.PAD, lab_text.EOS)
    assert chat.decode(ids) == " ".join(word for word in words if word not in special)


@pytest.mark.parametrize("word", ["hello", "11", "s7", "<unk>", "ANS2", "é", "Wait"])
def test_an_unknown_word_is_an_error(chat, word):
    with pytest.raises(UserError, match=rf"^the tokenizer in .* cannot encode '{word}': task, data and model must fit"):
        chat.encode(f"P 9 {word} other")


def test_the_notice_is_that_of_prompts():
    assert f"\n{lab_text.NOTICE}" == TRUNCATED


def test_what_is_cut_gets_its_notice_in_one_word(chat):
    assert chat.cut("1 2 3 4 5", 5) == "1 2 3 4 5"
    assert chat.cut("1 2 3 4 5", 3) == "1 2" + TRUNCATED
    assert len(chat.encode(chat.cut("1 2 3 4 5", 3))) == 3


def test_an_attempt_that_was_sampled_goes_into_the_refine_prompt_as_it_was(chat):
    solution = "s1 9 # 10 4 WAIT s1 9 # 10 3 s2 3 * 9 5 s3 5 - 3 2 ANS 2"
    sampled = [*chat.encode(solution), lab_text.WORDS.index(lab_text.EOS)]
    prompt = lab_text.refine_prompt("opsd", "9 s1 # 10 s2 * 9 s3 - 3", chat.decode(sampled), "s1 3 s2 5 s3 2")
    ids = chat.prompt_ids(prompt)
    assert chat.decode(ids, special=True) == f"P 9 s1 # 10 s2 * 9 s3 - 3 I {solution} R s1 3 s2 5 s3 2 A"
    opd = chat.prompt_ids(lab_text.refine_prompt("opd", "9 s1 # 10 s2 * 9 s3 - 3", chat.decode(sampled), None))
    assert chat.decode(opd, special=True) == f"P 9 s1 # 10 s2 * 9 s3 - 3 I {solution} A"


def test_vanilla_prompts():
    assert lab_text.vanilla_teacher_prompt("opd", "9 s1 # 10", None) == "P 9 s1 # 10"
    assert lab_text.vanilla_teacher_prompt("opsd", "9 s1 # 10", "s1 3") == "P 9 s1 # 10 R s1 3"


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("mix", [STUDENT_MIX, TEACHER_MIX])
def test_every_example_fits_the_models(chat, name, mix):
    longest = max(
        len(chat.prompt_ids(example.prompt)) + len(chat.encode(f"{example.given} {example.response} {lab_text.EOS}"))
        for example in islice(corpus(WORLDS[name], mix, 0), 500)
    )
    assert longest <= 131 < lab_models.STUDENT["max_position_embeddings"]


def test_a_dialogue_has_the_response_and_its_end(chat):
    messages = [{"role": "user", "content": "P 9 s1 # 10"}, {"role": "assistant", "content": "s1 9 # 10 3 ANS 3"}]
    tokenizer = lab_models.lab_tokenizer(256)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "P 9 s1 # 10 A s1 9 # 10 3 ANS 3 <eos>"


@pytest.mark.parametrize(("settings", "parameters"), [(lab_models.STUDENT, 363_120), (lab_models.TEACHER, 814_248)])
def test_sizes(settings, parameters):
    own = {key: value for key, value in settings.items() if key != "seed"}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(lab_text.WORDS), **own))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
