"Seeds that share a card: each leaves what it leaves alone. A call stands in for a graph, as in test_gpu."

import dataclasses
import shutil
import signal

import pytest
import torch
from homes import FAMILY, SMOKE, TUNE
from test_gpu import CHUNKY, Poisoned, dropping, graphs, same_bits, small  # noqa: F401
from test_plain import PRETRAIN, runs

from promptnb import captured, collect, core, train
from promptnb import cli as command
from promptnb.experiments import job, notebook, plain, plan
from promptnb.experiments.plan import Request

CPU = torch.device("cpu")
SEEDS = (0, 1, 2)


def seeded(seed):
    "The settings of a fit with a seed of its own."
    return dataclasses.replace(CHUNKY, seed=seed)


def alone(seed):
    "A model fitted by itself, and its log."
    model, sampler = dropping()
    return model, train.fit(model, sampler, seeded(seed))


def beside(folder=None, sampler_of=lambda seed, sampler: sampler):
    "(models, works): a fit for each seed, begun side by side."
    made = {seed: dropping() for seed in SEEDS}
    works = [
        train.fitting(
            model, sampler_of(seed, sampler), seeded(seed), folder and folder / str(seed), desc=f"seed {seed}"
        )
        for seed, (model, sampler) in made.items()
    ]
    return [model for model, _ in made.values()], works


def test_seeds_side_by_side_end_in_the_bits_of_each_alone(graphs):
    models, works = beside()
    logs = captured.in_turn(works, CPU)
    for seed, model, log in zip(SEEDS, models, logs, strict=True):
        single, wanted = alone(seed)
        assert same_bits(model, single) and log.losses == wanted.losses and log.status == "ok"
    assert not same_bits(models[0], models[1])


def test_a_chunk_of_each_seed_is_launched_before_the_first_is_waited_for(graphs, monkeypatch):
    order, fill = [], captured.Captured.fill

    def noted(self, draws, first):
        if getattr(self, "replay", None):
            order.append((self.fit.desc[-1], first))
        fill(self, draws, first)

    monkeypatch.setattr(captured.Captured, "fill", noted)
    captured.in_turn(beside()[1], CPU)
    assert order[:6] == [("0", 0), ("1", 0), ("2", 0), ("0", 20), ("1", 20), ("2", 20)]


@pytest.mark.fault(10)
def test_nan_in_one_seed_does_not_stop_the_others(graphs, tmp_path):
    models, works = beside(tmp_path, lambda seed, sampler: Poisoned(sampler, 47) if seed == 1 else sampler)
    logs = captured.in_turn(works, CPU)
    assert [log.status for log in logs] == ["ok", "diverged", "ok"] and logs[1].step == 47
    assert same_bits(models[0], alone(0)[0]) and same_bits(models[2], alone(2)[0])


@pytest.mark.fault(1)
@pytest.mark.parametrize("at", [7, 33, 61])
def test_seeds_that_were_killed_go_on_each_from_its_own_checkpoint(at, graphs, monkeypatch, tmp_path):
    class Killed(BaseException):
        pass

    def update(self, real=captured.Captured.update):
        if self.fit.desc == "seed 1" and self.fit.step + int(self.at) >= at and getattr(self, "replay", None):
            raise Killed
        real(self)

    def killed(self):
        raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(captured.Captured, "update", update)
        m.setattr(captured.Side, "stop", killed)  # the others get no time for a checkpoint
        captured.in_turn(beside(tmp_path)[1], CPU)
    models, works = beside(tmp_path)
    captured.in_turn(works, CPU)
    assert all(same_bits(model, alone(seed)[0]) for seed, model in zip(SEEDS, models, strict=True))


@pytest.mark.fault(3)
def test_sigterm_reaches_all_seeds(graphs, monkeypatch, tmp_path, capsys):
    def update(self, real=captured.Captured.update):
        real(self)
        if self.fit.desc == "seed 1" and self.fit.step + int(self.at) == 33 and getattr(self, "replay", None):
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m, pytest.raises(train.Interrupted, match="seed 1: told to stop at step 40"):
        m.setattr(captured.Captured, "update", update)
        captured.in_turn(beside(tmp_path)[1], CPU)
    assert signal.getsignal(signal.SIGTERM) is before
    newest = [core.Checkpoints(tmp_path / str(seed), {}).paths()[0].stem for seed in SEEDS]
    assert newest == ["step-000000050", "step-000000040", "step-000000040"]
    models, works = beside(tmp_path)
    captured.in_turn(works, CPU)
    assert all(same_bits(model, alone(seed)[0]) for seed, model in zip(SEEDS, models, strict=True))


def test_what_is_printed_stays_with_its_seed(capsys, tmp_path):
    import contextlib

    def talks(name):
        with open(tmp_path / name, "w") as log, contextlib.redirect_stdout(log):
            for k in range(3):
                print(name, k)
                yield

    captured.in_turn([talks("a"), talks("b")], CPU)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["a 0\na 1\na 2\n", "b 0\nb 1\nb 2\n"]
    assert capsys.readouterr().out == ""


def test_each_side_draws_random_numbers_of_its_own():
    def draws():
        torch.manual_seed(5)
        yield
        return torch.rand(3)

    before = torch.get_rng_state()
    a, b = captured.in_turn([draws(), draws()], CPU)
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)


# ---- jobs


@pytest.fixture
def home(tmp_home, graphs, monkeypatch):
    "A workbook with what smoke policies are trained on, on a machine with a card: this processor."
    collect.collect(FAMILY, "expert", 4, say=lambda *a: None)
    monkeypatch.setattr(notebook, "cards", lambda: ["0"])
    monkeypatch.setattr(captured, "CHUNK", 3)
    return tmp_home


def records(seed):
    "What the records of a seed's policies say, but for time and place."
    out = [core.read_record(run.path) for run in runs(seed=seed)]
    return [{k: r[k] for k in ("run_id", "status", "rows", "weights", "recipe_digest", "code")} for r in out]


def forget(*seeds):
    for run in (run for seed in seeds for run in runs(seed=seed)):
        run.path.unlink()
    shutil.rmtree(core.runs_dir() / "policies")


WORDS = [f"{PRETRAIN}@0", f"{PRETRAIN}@1"]


def test_jobs_of_all_seeds_leave_one_record_each_that_equals_its_own(home, monkeypatch):
    seen, real = [], captured.in_turn
    with monkeypatch.context() as m:
        m.setattr(captured, "in_turn", lambda works, device: seen.append(len(works)) or real(works, device))
        assert command.main(["job", *WORDS, *SMOKE, "--plain"]) in (None, 0)
    together = [records(0), records(1)]
    assert seen == [2] and all(job.stamp(job.find_job(PRETRAIN), seed, "smoke").exists() for seed in (0, 1))
    forget(0, 1)
    for seed in (0, 1):
        job.run_job(PRETRAIN, seed, "smoke")
    assert together == [records(0), records(1)]


@pytest.mark.fault(3)
def test_seeds_whose_time_is_up_are_left_over_and_go_on(home, monkeypatch, capsys):
    def update(self, real=captured.Captured.update):
        real(self)
        if ".s1" in self.fit.desc and self.fit.step + int(self.at) == 4 and getattr(self, "replay", None):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as m, pytest.raises(notebook.Stopped):
        m.setattr(captured.Captured, "update", update)
        plain.plain_jobs(WORDS, scale="smoke")
    said = capsys.readouterr().out
    assert all(f"left: {word}: 1 of 1 runs" in said for word in WORDS)
    plain.plain_jobs(WORDS, scale="smoke")
    assert capsys.readouterr().out.count("going on from step") == 2
    stopped = [records(0), records(1)]
    forget(0, 1)
    for seed in (0, 1):
        job.run_job(PRETRAIN, seed, "smoke")
    assert stopped == [records(0), records(1)]


def test_a_notebook_is_told_of_all_its_seeds(home, monkeypatch):
    given = []

    def execute(nb, params, out, kernel=None):
        notebook.check_parameters(nb, params)
        given.append({k: params[k] for k in ("job", "seed", "beside")})
        job.run_seeds(params["job"], [params["seed"], *map(int, params["beside"].split(","))], "smoke")

    monkeypatch.setattr(notebook, "execute", execute)
    notebook.job_command([*WORDS, WORDS[0]], 0, "smoke")
    assert given == [dict(job=PRETRAIN, seed=0, beside="1")]
    assert all(run.finished for seed in (0, 1) for run in runs(seed=seed))


def test_seeds_share_a_process_on_a_card_only(monkeypatch):
    todo = [*(notebook.asked_job(word, 0) for word in (*WORDS, f"{TUNE}@0"))]
    policies, tune = todo[0][0], todo[2][0]
    monkeypatch.setattr(notebook, "cards", lambda: ["0"])
    assert notebook.together(todo, "auto") == [(policies, [0, 1]), (tune, [0])]
    assert notebook.together(todo, "cpu") == [(policies, [0]), (policies, [1]), (tune, [0])]
    monkeypatch.setattr(notebook, "cards", list)
    assert notebook.together(todo, "auto") == [(policies, [0]), (policies, [1]), (tune, [0])]


def test_wrong_seeds_beside_are_one_line(refused):
    page = core.root() / notebook.TEMPLATE
    refused(notebook.check_parameters, page, dict(beside="1;2"), says=["'beside' is '1;2'", "a whole number"])


def test_the_engine_gives_a_card_all_seeds_of_a_job():
    asked = Request("prompt_tuning_dt", ("table1",), "smoke", (0, 1, 2), (FAMILY,))
    tasks = plan.tasks_of(asked, done=lambda run: False)
    on_gpu, on_cpu = (plan.plan(asked, where, tasks, seconds=lambda run: None) for where in ("cuda", "cpu"))
    commands = [rule.command for rule in on_gpu if " job " in rule.command]
    words = [f"{PRETRAIN.replace('pdt_fig2', 'table1')}@{seed}" for seed in SEEDS]
    assert " ".join(words) in commands[0] and len(commands) == 2
    assert sum(" job " in rule.command for rule in on_cpu) == 6
    (tune,) = [rule for rule in on_gpu if f"{TUNE}@0" in rule.command]
    assert len(tune.outputs) == 3 and {name for name in tune.inputs if "pretrain" in name} == {
        name for rule in on_gpu if words[0] in rule.command for name in rule.outputs
    }
