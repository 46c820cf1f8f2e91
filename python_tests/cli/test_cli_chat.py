"""`locas chat`: answers, the memory switched off and on, a text studied, and what is wrong said without an end."""

import io
import os
import signal

import pytest
import torch
from support.helpers import save_host
from support.study import CHAT, TEXT, study_host, study_tokenizer

import locas_ext as locas
from locas_ext.cli import main
from locas_ext.cli.tasks import chat as chat_module
from locas_ext.cli.tasks import generate as generate_module
from locas_ext.evaluation.inputs import load_host


@pytest.fixture(scope="module", params=[None, CHAT], ids=["plain", "chat"])
def host(request, tmp_path_factory):
    folder = save_host(study_host(), tmp_path_factory.mktemp("chat") / "host")
    study_tokenizer(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def memory(host):
    model, _ = load_host(str(host), None, "cpu")
    made = locas.attach(model, locas.LocasConfig(rank=4, scale=3.0))
    made.initialize(list(range(3, 99)))
    with torch.no_grad():
        made.slots.normal_(generator=torch.Generator().manual_seed(3))
    made.save_pretrained(host.parent / "memory")
    return host.parent / "memory"


def talk(capsys, monkeypatch, host, *lines, options=()):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    options = options or ["--rank", "4"]
    status = main(["chat", "--model", str(host), "--device", "cpu", "--max-new-tokens", "6", *map(str, options)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def continued(host, memory, ids):
    """The likeliest 6 tokens by plain forwards, with the memory if there is one."""
    model, tokenizer = load_host(str(host), None, "cpu")
    if memory is not None:
        locas.load(model, memory)
    written = []
    for _ in range(6):
        with torch.no_grad():
            written.append(model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax().item())
        text = tokenizer.decode(written, skip_special_tokens=True)
        if written[-1] == 0 or ("\n" in text and not tokenizer.chat_template):
            break
    return text.strip()


def test_answers_come_with_the_memory_and_without(host, memory, capsys, monkeypatch):
    status, out, err = talk(capsys, monkeypatch, host, "Who is it?", "/off", "/new", "Who is it?", options=["--memory", memory])
    assert status == 0, err
    tokenizer = study_tokenizer()
    chat = load_host(str(host), None, "cpu")[1].chat_template
    prompt = "<u>Who is it?</u><a>" if chat else "Question: Who is it?\nAnswer:"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with_it, without = continued(host, memory, ids), continued(host, None, ids)
    assert with_it != without
    first, second = out.split("the bare host")
    assert with_it in first and without in second and "version 1" in first


def test_a_conversation_goes_on_from_what_was_said(host, capsys, monkeypatch):
    prompts, ask = [], chat_module.Chat._prompt
    monkeypatch.setattr(chat_module.Chat, "_prompt", lambda self: prompts.append(ask(self)) or prompts[-1])
    assert talk(capsys, monkeypatch, host, "First?", "Second?", "/new", "Third?")[0] == 0
    tokenizer = study_tokenizer()
    texts = [tokenizer.decode(ids) for ids in prompts]
    chat = "<u>" in texts[0]
    assert ("First?" in texts[1]) == chat and "Second?" in texts[1]
    assert "First?" not in texts[2] and "Third?" in texts[2]


def test_a_long_conversation_loses_its_oldest_exchanges(host, capsys, monkeypatch):
    lines = [f"Number {n}: {'word ' * 40}?" for n in range(5)]
    status, out, err = talk(capsys, monkeypatch, host, *lines)
    assert status == 0 and "positions" not in out
    status, out, err = talk(capsys, monkeypatch, host, "word " * 400, "Still there?")
    assert status == 0 and "but the model has 256 positions" in out.replace("\n", " ")


def test_a_text_is_studied_and_the_memory_kept(host, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    studied = []

    def study(self, texts, tokenizer, seed):
        studied.append(texts)
        self.initialize(list(range(3, 40)))
        with torch.no_grad():
            self.slots.add_(0.1)
        return "studied"

    monkeypatch.setattr(locas.Memory, "study", study)
    lines = [f"/study {tmp_path / 'text.txt'}", f"/save {tmp_path / 'kept'}"]
    status, out, _ = talk(capsys, monkeypatch, host, *lines)
    assert status == 0 and studied == [TEXT] and "studied\n" in out and "was not kept" not in out
    model, _ = load_host(str(host), None, "cpu")
    assert locas.load(model, tmp_path / "kept").version == 1
    assert "was not kept" in talk(capsys, monkeypatch, host, lines[0])[1]


def test_what_is_wrong_is_said_and_the_conversation_goes_on(host, tmp_path, capsys, monkeypatch):
    lines = ["/study", "/study nowhere.txt", "/save", "/dance", "", "/help", "/quit", "never read"]
    status, out, _ = talk(capsys, monkeypatch, host, *lines)
    assert status == 0
    for said in ("/study: expected a text file", "nowhere.txt", "/save: expected a folder", "there is no /dance", "/quit  "):
        assert said in out, said
    status, _, err = talk(capsys, monkeypatch, host, options=["--memory", tmp_path, "--rank", "4"])
    assert status == 2 and "--rank is 4, but --memory says what the memory is made of" in err
    status, _, err = talk(capsys, monkeypatch, host, options=["--memory", tmp_path])
    assert status != 0 and "holds no memory" in err


def test_ctrl_c_ends_an_answer_and_not_the_conversation(host, capsys, monkeypatch):
    model, tokenizer = load_host(str(host), None, "cpu")
    calls, generate = [], model.generate

    def ends(**options):
        calls.append(None)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(**options)

    monkeypatch.setattr(model, "generate", ends)
    monkeypatch.setattr(chat_module, "load_host", lambda *arguments: (model, tokenizer))
    status, out, _ = talk(capsys, monkeypatch, host, "First?", "Second?")
    assert status == 0 and len(calls) == 2 and "stopped" in out


def test_what_breaks_an_answer_is_said_and_what_was_learned_is_still_there(host, tmp_path, capsys, monkeypatch):
    model, tokenizer = load_host(str(host), None, "cpu")
    monkeypatch.setattr(model, "generate", lambda **options: torch.empty(2**62, 4))
    monkeypatch.setattr(chat_module, "load_host", lambda *arguments: (model, tokenizer))
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, err = talk(capsys, monkeypatch, host, "First?", os.fsdecode(b"t\xe9"), "/save ~/kept")
    assert status == 0 and "out of memory: " in out and "this line is not text in UTF-8" in out, err
    assert (tmp_path / "kept" / "locas_config.json").exists()


def test_a_signal_that_ends_the_process_ends_the_conversation(host, capsys, monkeypatch):
    model, tokenizer = load_host(str(host), None, "cpu")
    monkeypatch.setattr(model, "generate", lambda **options: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(chat_module, "load_host", lambda *arguments: (model, tokenizer))
    assert talk(capsys, monkeypatch, host, "First?", "Second?")[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_not_taken_for_an_answer(host, capsys, monkeypatch, temperature):
    model, tokenizer = load_host(str(host), None, "cpu")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    monkeypatch.setattr(generate_module, "load_host", lambda *arguments: (model, tokenizer))
    assert main(["generate", "--model", str(host), "--prompt", "First?", "--temperature", str(temperature)]) == 1
    assert "the model's logits are not finite" in capsys.readouterr().err
