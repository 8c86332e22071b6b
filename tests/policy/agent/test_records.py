"""Records: append-only, resumable, readable; and what is made of them."""

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from policy.agent.dialogue import COMPLETED, FAILED, Decision, DialogueConfig, Stay, Turn, treat_all
from policy.agent.prompts import Prompts
from policy.agent.records import (
    Records,
    from_record,
    last_attempts,
    read_records,
    summarize,
    to_record,
)
from policy.agent.transcript import markdown, page, published_results
from policy.serving.backend import Reply, ToolCall
from policy.serving.client import Endpoint
from policy.serving.openai import OpenAIBackend
from tests.policy.agent.conftest import PATIENTS, STEPS
from tests.policy.serving.fake import FakeServer, free_port, slow, truncated
from worldmodel.errors import InputError

DECISION = Decision(
    step=0, action=7, reward=1.5, sofa=8.0, meanbp=60.0, lactate=3.0, pao2=80.0, fio2=40.0,
    previous_vasopressor=0, simulations=1, invalid=0,
)  # fmt: skip


def turn(prompt, reply, *, text="<b>hi</b>"):
    return Turn(
        messages=({"role": "user", "content": "```\nMAP 60 \ud800"},),
        reply=Reply(
            content=text,
            tool_calls=(ToolCall("c1", "prescription", '{"vasopressor": 1, "iv_fluid": 2}'),),
            prompt_ids=prompt,
            token_ids=reply,
            logprobs=(-0.5,) * len(reply),
            usage={"prompt_tokens": len(prompt), "completion_tokens": len(reply)},
        ),
        seed=3,
    )


def stay(patient, *, status=COMPLETED, outcome="release", decisions=(DECISION,)):
    return Stay(
        patient=patient,
        status=status,
        failure=None if status == COMPLETED else "backend",
        detail=None if status == COMPLETED else "gone",
        outcome=outcome if status == COMPLETED else None,
        decisions=list(decisions),
        turns=[turn((1, 2, 3), (4, 5)), turn((1, 2, 3, 4, 5, 6), (7,))],
        closing="The stay is over.",
        invalid=Counter({"no_call": 2}),
        tool_calls=2,
    )


def test_a_line_per_attempt_that_is_read_back(tmp_path):
    file = tmp_path / "records.jsonl"
    records = Records(file)
    records.append(to_record(stay(4, status=FAILED)))
    records.append(to_record(stay(9)))
    records.append(to_record(stay(4), attempt=1))
    assert len(file.read_bytes().splitlines()) == 3
    again = Records(file)
    assert again.completed == {4, 9} and again.attempts == {4: 2, 9: 1}
    last = last_attempts(file)
    assert list(last) == [4, 9] and last[4]["attempt"] == 1
    assert last[4]["turns"][0]["messages"][0]["content"].endswith("\ud800")
    with pytest.raises(InputError, match="completed before"):
        again.append(to_record(stay(9)))


def test_half_a_line_is_cut_off(tmp_path):
    file = tmp_path / "records.jsonl"
    Records(file).append(to_record(stay(1)))
    whole = file.read_bytes()
    for half in (b'{"version": 1, "pat', b"x" * 200_000):
        file.write_bytes(whole + half)
        assert Records(file).completed == {1}
        assert file.read_bytes() == whole
    file.write_bytes(b"no line at all")
    assert Records(file).completed == set() and file.read_bytes() == b""


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"version": 99, "patient": 1}'])
def test_a_line_that_is_no_record(tmp_path, line):
    file = tmp_path / "records.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(InputError, match="line 1"):
        list(read_records(file))


def test_only_new_prompt_ids_are_kept():
    first, second = to_record(stay(1))["turns"]
    assert first["reply"]["prompt_ids"] == (1, 2, 3) and not first["reply"]["restarts"]
    assert second["reply"]["prompt_ids"] == (6,) and not second["reply"]["restarts"]
    broken = stay(1)
    broken.turns[1] = turn((1, 9, 3, 4, 5, 6), (7,))
    second = to_record(broken)["turns"][1]["reply"]
    assert second["restarts"] and second["prompt_ids"] == (1, 9, 3, 4, 5, 6)


def test_a_record_is_a_stay_again(tmp_path):
    """Through JSON, with a conversation that was begun anew, and one without ids."""
    whole = stay(5)
    whole.turns[1] = replace(turn((7, 8), (9,)), opens=True)
    whole.decisions = [replace(DECISION, probabilities=(0.04,) * 25, turn=1)]
    wordless = stay(6, status=FAILED)
    wordless.turns = [
        replace(one, reply=replace(one.reply, prompt_ids=None, token_ids=None, logprobs=None))
        for one in wordless.turns
    ]
    records = Records(tmp_path / "records.jsonl")
    for one in (whole, wordless):
        records.append(to_record(one))
    assert list(map(from_record, read_records(records.path))) == [whole, wordless]


def test_summary_by_hand():
    untreated = replace(DECISION, action=0, step=1, previous_vasopressor=1, simulations=3)
    records = [
        to_record(stay(1, decisions=(DECISION, untreated))),  # 3.0; one of two breaks G1
        to_record(stay(2, outcome="death", decisions=(replace(DECISION, reward=-9.0),))),
        to_record(stay(3, status=FAILED)),
    ]
    found = summarize(records)
    assert (found["stays"], found["completed"], found["failed"]) == (3, 2, 1)
    assert found["reward"] == -3.0 and found["reward_se"] == pytest.approx(6.0)
    assert found["deaths"] == 50.0
    assert found["g1"] == pytest.approx(100 / 3) and found["g2"] == 0.0
    assert found["adherence"] == pytest.approx(200 / 3)
    assert found["simulations"] == 1.5 and found["invalid_calls"] == 1.5
    assert (found["prompt_tokens"], found["completion_tokens"]) == (27, 9)
    assert found["failures"] == {"backend": 1} and found["invalid"] == {"no_call": 6}
    nothing = summarize([to_record(stay(3, status=FAILED, decisions=()))])
    assert nothing["reward"] is nothing["adherence"] is nothing["simulations"] is None


def test_pages_show_words_as_words():
    record = to_record(stay(5))
    text, html = markdown(record), page(record)
    assert "[1, 2]" in text and "````\n```\nMAP 60" in text  # a fence longer than what is said
    assert "&lt;b&gt;hi&lt;/b&gt;" in html and "<b>hi" not in html
    assert "failed: backend (gone)" in markdown(to_record(stay(5, status=FAILED)))


def test_published_form():
    real = {"total_reward": 2.0, "trajectory_length": 1, "outcome": "death", "actions": "[0,0]"}
    untreated = replace(DECISION, action=0)
    raised = replace(DECISION, meanbp=70.0, lactate=1.0, step=3)
    records = [
        to_record(stay(8, decisions=(DECISION, untreated, raised)), real=real),
        to_record(stay(9, status=FAILED)),
    ]
    (entry,) = published_results(records)
    assert entry["metadata"] == {
        "episode_id": 0,
        "stay_id": 8,
        "model": {
            "total_reward": 4.5,
            "trajectory_length": 3,
            "outcome": "release",
            "actions": "[1,2],[0,0],[1,2]",
        },
        "real": real,
        "guideline_compliance": {
            "total_prescriptions": 3,
            "hypoperfusion_violations": 1,
            "vaso_weaning_violations": 1,
        },
    }
    roles = [message["role"] for message in entry["messages"]]
    assert roles == ["user", "assistant", "tool_call"] * 2 + ["tool_response"]


class Flaky:
    """A model behind HTTP that prescribes [1, 1], and fails in every way on its way there."""

    def __init__(self):
        self.lock, self.count = threading.Lock(), 0

    def __call__(self, handler, request):
        with self.lock:
            self.count += 1
            fault = self.count % 7
        if fault == 1:
            return 500, {"error": {"message": "broken"}}
        if fault == 2:
            return truncated('{"choices": [{"message": {"role": "assi')(handler, request)
        if fault == 3:
            return 200, '{"choices": [{"mess'
        if fault == 4:
            handler.connection.close()
            return None
        return self.answer()

    def answer(self):
        arguments = json.dumps({"vasopressor": 1, "iv_fluid": 1})
        function = {"name": "prescription", "arguments": arguments}
        call = {"id": f"c{self.count}", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"choices": [{"message": message, "finish_reason": "tool_calls"}]}


def run(make_ward, url, seen, *, attempts=30):
    endpoint = Endpoint(
        url, "m", attempts=attempts, first_wait_s=0.001, longest_wait_s=0.01, timeout_s=5.0
    )

    async def go():
        backend = OpenAIBackend(endpoint)
        pool = make_ward()
        await treat_all(
            range(PATIENTS), backend, pool, Prompts("compact"), DialogueConfig(),
            seeds=[0] * PATIENTS, concurrency=5, finished=seen.append,
        )  # fmt: skip
        pool.close()
        await backend.close()

    asyncio.run(go())


def test_every_stay_exactly_once_behind_a_server_that_keeps_failing(make_ward):
    seen = []
    with FakeServer(Flaky()) as server:
        run(make_ward, server.url, seen)
    assert sorted(stay.patient for stay in seen) == list(range(PATIENTS))
    for stay in seen:
        assert stay.status == COMPLETED and not stay.invalid
        assert [d.action for d in stay.decisions] == [6] * len(stay.decisions)
        assert len(stay.decisions) <= STEPS and len(stay.turns) == len(stay.decisions)


def test_a_server_that_dies_and_comes_back(make_ward):
    seen = []
    first = FakeServer(slow(0.02, Flaky().answer()), port=free_port())
    agent = threading.Thread(target=run, args=(make_ward, first.url, seen))
    with first:
        agent.start()
        while len(first.requests) < 9:
            time.sleep(0.01)
    time.sleep(0.2)
    assert len(seen) < PATIENTS
    with FakeServer(Flaky().answer(), port=first.port):
        agent.join(60)
    assert sorted(stay.patient for stay in seen) == list(range(PATIENTS))
    assert all(stay.status == COMPLETED for stay in seen)


def test_a_server_that_only_fails_completes_nothing(make_ward):
    seen = []
    with FakeServer((500, {"error": "broken"})) as server:
        run(make_ward, server.url, seen, attempts=2)
    assert [stay.status for stay in seen] == [FAILED] * PATIENTS
    assert not any(stay.decisions for stay in seen)
