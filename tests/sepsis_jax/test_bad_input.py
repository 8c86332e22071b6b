"""Bad input of every kind to every command: status 2, one line, nothing written, little time."""

import json
import shlex
import shutil

import jax
import pytest

from policy.checkpoint import save_policy
from policy.simple import NoTreatment
from tests.sepsis_jax.command_line import call, refuse
from tests.toy import toy_episodes
from worldmodel.episode_files import save_episodes, to_table
from worldmodel.models.checkpoint import save_world_model
from worldmodel.models.clinical_model import ModelConfig
from worldmodel.models.world_model import init_world_model
from worldmodel.scaling import published_scaler

SMALL = {"hidden": 8, "layers": 1, "embed": 4, "head": 4}
YAML = {
    "unknown": "colour: red\n",
    "broken": "a: [\nb: {\n",
    "text": "just words\n",
    "list": "- 1\n- 2\n",
    "seed": "seed: four\n",
    "nan": "seed: .nan\n",
    "split": "split: 3\n",
    "hours": 'step_hours: "four"\n',
    "nested": "model: 3\n",
    "doubled": "seed: 1\nseed: 2\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good and bad files by name; a test may not change them."""
    folder = tmp_path_factory.mktemp("inputs of tests")  # a name with spaces
    save_episodes(toy_episodes(), folder / "cohort")
    for variant in ("recurrent", "reference"):
        made = init_world_model(
            jax.random.key(0), published_scaler(), ModelConfig(variant=variant, **SMALL)
        )
        save_world_model(made, folder / variant)
    save_policy(NoTreatment(), folder / "policy")
    (folder / "file").write_text("what a file holds\n")
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "table.csv").write_text("stay_id,step\n1,0\n")
    (folder / "blank.csv").touch()
    (folder / "bytes.csv").write_bytes(bytes(range(256)))
    to_table(toy_episodes()).to_csv(folder / "own.csv", index=False)
    header, *rows = (folder / "own.csv").read_text().splitlines()
    doubled = [f"{header},stay_id", *(f"{row},1" for row in rows)]
    (folder / "doubled.csv").write_text("\n".join(doubled))
    columns = ["stay_id", "step", *(f"action_{i}" for i in range(25)), "action_3"]
    (folder / "twice.csv").write_text(",".join(columns) + "\n")
    (folder / "zeros.parquet").write_bytes(bytes(100))
    (folder / "latin.yaml").write_bytes("seed: 3 # \xe9t\xe9\n".encode("latin-1"))
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").touch()
    (folder / "hollow").mkdir()
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    copy = shutil.copytree
    # Damaged copies.
    for name in ("recurrent", "cohort", "policy"):
        damaged = copy(folder / name, folder / f"{name}-text")
        file = damaged / ("policy.json" if name == "policy" else "manifest.json")
        file.write_text("{")
        damaged = copy(folder / name, folder / f"{name}-latin")
        file = damaged / file.name
        file.write_bytes(b'{"kind": "\xe9"}')
        damaged = copy(folder / name, folder / f"{name}-list")
        (damaged / file.name).write_text("[1]")
    cut = copy(folder / "recurrent", folder / "cut")
    for file in cut.rglob("*"):
        if file.is_file() and "params" in file.parts and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:100])
    shutil.rmtree(copy(folder / "recurrent", folder / "stripped") / "params")
    (copy(folder / "recurrent", folder / "unscaled") / "scaler.json").write_text("{}")
    hours = copy(folder / "cohort", folder / "hours")
    manifest = json.loads((hours / "manifest.json").read_text())
    (hours / "manifest.json").write_text(json.dumps({**manifest, "step_hours": "four"}))
    hours = copy(folder / "recurrent", folder / "model-hours")
    manifest = json.loads((hours / "manifest.json").read_text())
    (hours / "manifest.json").write_text(json.dumps({**manifest, "step_hours": "four"}))
    other = copy(folder / "recurrent", folder / "other")
    (other / "manifest.json").write_text(json.dumps({**manifest, "config": {"hidden": "x"}}))
    other = copy(folder / "recurrent", folder / "wide")
    config = {**manifest["config"], "hidden": 16}
    (other / "manifest.json").write_text(json.dumps({**manifest, "config": config}))
    short = copy(folder / "cohort", folder / "short") / "episodes.parquet"
    short.write_bytes(short.read_bytes()[:-50])
    (copy(folder / "cohort", folder / "rowless") / "episodes.parquet").unlink()
    (copy(folder / "cohort", folder / "scaleless") / "scaler.json").unlink()
    (copy(folder / "cohort", folder / "swapped") / "episodes.parquet").write_bytes(b"words")
    return folder


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


# One bad input each; {name} is a file of `files`, {out} a place that is free.
CASES = [line for line in """
cohort synthetic --out {out} --patients 3
cohort synthetic --out {out} --patients 0
cohort synthetic --out {out} --patients -5
cohort synthetic --out {out} --patients nan
cohort synthetic --out {out} --patients 1e3
cohort synthetic --out {out} --patients 99999999999999999999
cohort synthetic --out {out} --patients 2000000000
cohort synthetic --out {out} --confounding nan
cohort synthetic --out {out} --confounding inf
cohort synthetic --out {out} --confounding -inf
cohort synthetic --out {out} --confounding -1
cohort synthetic --out {out} --confounding much
cohort synthetic --out {out} --seed -1
cohort synthetic --out {out} --seed 1e400
cohort synthetic --out {out} --seed 99999999999999999999
cohort synthetic --out {file}
cohort synthetic --out {full}
cohort synthetic --out {file}/below
cohort synthetic --out /proc/cohort
cohort synthetic --patients 20
cohort synthetic --out {out} --colour red
cohort synthetic --out {out} surplus
cohort mimic-iv --data {missing} --out {out}
cohort mimic-iv --data {file} --out {out}
cohort mimic-iv --data {empty} --out {out}
cohort mimic-iv --data {binary} --out {out}
cohort mimic-iv --data {hollow} --out {out}
cohort mimic-iv --data {cohort} --out {out}
cohort mimic-iv --data {hollow} --out {file}
cohort mimic-iv --data {hollow} --out {out} --seed -1
cohort mimic-iv --data {hollow} --out {out} -o colour=red
cohort mimic-iv --data {hollow} --out {out} -o step_hours=nan
cohort mimic-iv --data {hollow} --out {out} -o step_hours=four
cohort mimic-iv --data {hollow} --out {out} -o step_hours=-4
cohort mimic-iv --data {hollow} --out {out} -o step_hours
cohort mimic-iv --data {hollow} --out {out} --config {hours.yaml}
cohort mimic-iv --data {hollow} --out {out} --config {latin.yaml}
cohort mimic-iv --data {hollow} --out {out} --config {binary}
cohort mimic-iv --data {hollow} --out {out} --config {missing}
cohort mimic-iv --data {hollow} --out {out} --config {hollow}
cohort mimic-iv --data {hollow} --out {out} --config {unknown.yaml}
cohort template --out {out}
cohort template --out {out}.xlsx
cohort template --out {table.csv}
cohort template --out {file}/own.csv
cohort template
cohort table --table {missing}.csv --out {out}
cohort table --table {missing}.parquet --out {out}
cohort table --table {file} --out {out}
cohort table --table {zeros.parquet} --out {out}
cohort table --table {table.csv} --out {out}
cohort table --table {blank.csv} --out {out}
cohort table --table {bytes.csv} --out {out}
cohort table --table {own.csv} --out {file}
cohort table --table {own.csv} --out {full}
cohort table --table {own.csv} --out {out} --unit creatinine
cohort table --table {own.csv} --out {out} --unit creatinine=stone
cohort table --table {own.csv} --out {out} --unit colour=mg/dL
cohort table --table {own.csv} --out {out} --unit temp_c=F
cohort table --table {own.csv} --out {out} --set step_hours=0
cohort table --table {own.csv} --out {out} --set step_hours=nan
cohort table --table {own.csv} --out {out} --set missing_urine=guess
cohort table --table {own.csv} --out {out} --set fluid_edges=[3,2,1]
cohort table --table {own.csv} --out {out} --set fluid_edges=[1,2,3]
cohort table --table {own.csv} --out {out} --set units=creatinine
cohort table --table {own.csv} --out {out} --config {unknown.yaml}
cohort table --table {own.csv} --out {out} --config {latin.yaml}
cohort table --table {own.csv} --out {out} --seed -1
cohort table --table {own.csv}
cohort check --table {missing}.csv
cohort check --table {file}
cohort check --table {zeros.parquet}
cohort check --table {own.csv} --unit colour=mg/dL
cohort check --table {own.csv} --set colour=red
demo --out {file}
demo --out {full}/thesis.txt/demo
demo --out {out} --patients 3
demo --out {out} --patients -1
demo --out {out} --patients 2000000000
demo --out {out} --samples 0
demo --out {out} --samples 2000000000
demo --out {out} --seed -3
demo --out {out} --data {missing}
demo --out {out} --data {hollow}
demo --out {out} --data {file}
audit --episodes {missing} --out {out}
audit --episodes {file} --out {out}
audit --episodes {hollow} --out {out}
audit --episodes {recurrent} --out {out}
audit --episodes {short} --out {out}
audit --episodes {hours} --out {out}
audit --episodes {rowless} --out {out}
audit --episodes {swapped} --out {out}
audit --episodes {cohort-text} --out {out}
audit --episodes {cohort-latin} --out {out}
audit --episodes {cohort-list} --out {out}
audit --episodes {cohort} --out {file}
audit --episodes {cohort} --out {full}
audit --episodes {cohort} --out {out} --model {missing}
audit --episodes {cohort} --out {out} --model {cohort}
audit --episodes {cohort} --out {out} --model {policy}
audit --episodes {cohort} --out {out} --model {recurrent} --set split=holdout
audit --episodes {cohort} --out {out} --model {recurrent} --set step=-1
audit --episodes {cohort} --out {out} --model {recurrent} --set step=500
audit --episodes {cohort} --out {out} --model {recurrent} --set samples=0
audit --episodes {cohort} --out {out} --model {recurrent} --set samples=2000000000
audit --episodes {cohort} --out {out} --model {recurrent} --set stays=0
audit --episodes {cohort} --out {out} --config {split.yaml}
audit --episodes {cohort} --out {out} --config {latin.yaml}
audit --episodes {cohort} --out {out} --set seed=-1
audit --episodes {cohort} --out {out} --seed -1
world-model train --episodes {missing} --out {out}
world-model train --episodes {file} --out {out}
world-model train --episodes {policy} --out {out}
world-model train --episodes {scaleless} --out {out}
world-model train --episodes {hours} --out {out}
world-model train --episodes {short} --out {out}
world-model train --episodes {cohort} --out {file}
world-model train --episodes {cohort} --out {full}
world-model train --episodes {cohort} --out {file}/model
world-model train --episodes {cohort} --out {out} --config {missing}
world-model train --episodes {cohort} --out {out} --config {empty}/x
world-model train --episodes {cohort} --out {out} --config {binary}
world-model train --episodes {cohort} --out {out} --config {latin.yaml}
world-model train --episodes {cohort} --out {out} --config {list.yaml}
world-model train --episodes {cohort} --out {out} --config {text.yaml}
world-model train --episodes {cohort} --out {out} --config {broken.yaml}
world-model train --episodes {cohort} --out {out} --config {nan.yaml}
world-model train --episodes {cohort} --out {out} --config {seed.yaml}
world-model train --episodes {cohort} --out {out} --config {nested.yaml}
world-model train --episodes {cohort} --out {out} --config {hollow}
world-model train --episodes {cohort} --out {out} --set members=0
world-model train --episodes {cohort} --out {out} --set members=-2
world-model train --episodes {cohort} --out {out} --set members=1000000000
world-model train --episodes {cohort} --out {out} --set members=2.5
world-model train --episodes {cohort} --out {out} --set seed=-1
world-model train --episodes {cohort} --out {out} --set seed=99999999999999999999
world-model train --episodes {cohort} --out {out} --set stays.epochs=0
world-model train --episodes {cohort} --out {out} --set stays.batch_size=0
world-model train --episodes {cohort} --out {out} --set stays.learning_rate=nan
world-model train --episodes {cohort} --out {out} --set stays.learning_rate=-1
world-model train --episodes {cohort} --out {out} --set stays.learning_rate=.inf
world-model train --episodes {cohort} --out {out} --set model.hidden=0
world-model train --episodes {cohort} --out {out} --set model.hidden=1000000000
world-model train --episodes {cohort} --out {out} --set model.variant=best
world-model train --episodes {cohort} --out {out} --set model.precision=half
world-model train --episodes {cohort} --out {out} --set model
world-model train --episodes {cohort} --out {out} --set model=3
world-model train --episodes {cohort} --out {out} --set =3
world-model evaluate --model {missing} --episodes {cohort}
world-model evaluate --model {file} --episodes {cohort}
world-model evaluate --model {policy} --episodes {cohort}
world-model evaluate --model {cohort} --episodes {cohort}
world-model evaluate --model {cut} --episodes {cohort}
world-model evaluate --model {stripped} --episodes {cohort}
world-model evaluate --model {unscaled} --episodes {cohort}
world-model evaluate --model {wide} --episodes {cohort}
world-model evaluate --model {other} --episodes {cohort}
world-model evaluate --model {model-hours} --episodes {cohort}
world-model evaluate --model {recurrent-text} --episodes {cohort}
world-model evaluate --model {recurrent-latin} --episodes {cohort}
world-model evaluate --model {recurrent-list} --episodes {cohort}
world-model evaluate --model {recurrent} --episodes {recurrent}
world-model evaluate --model {recurrent} --episodes {cohort} --split all
world-model effects --model {missing} --out {out}
world-model effects --model {recurrent} --out {file}
world-model effects --model {recurrent} --out {full}
world-model effects --model {recurrent} --out {out} --patients 0
world-model effects --model {recurrent} --out {out} --patients 2000000000
world-model effects --model {recurrent} --out {out} --samples 2000000000
world-model effects --model {recurrent} --out {out} --step -1
world-model effects --model {recurrent} --out {out} --step 500
world-model effects --model {recurrent} --out {out} --held 0
world-model effects --model {recurrent} --out {out} --held 500
world-model effects --model {recurrent} --out {out} --confounding nan
world-model effects --model {recurrent} --out {out} --confounding -1
world-model effects --model {recurrent} --out {out} --records {missing}
world-model effects --model {recurrent} --out {out} --records {recurrent}
world-model values --model {recurrent} --out {out} --policy none
world-model values --model {recurrent} --out {out} --policy none --policy none
world-model values --model {recurrent} --out {out} --policy none --policy best
world-model values --model {recurrent} --out {out} --policy none --policy a={missing}
world-model values --model {recurrent} --out {out} --policy none --policy a={recurrent}
world-model values --model {recurrent} --out {file} --policy none --policy max
world-model values --model {recurrent} --out {out} --policy none --policy max --patients 1
world-model values --model {recurrent} --out {out} --policy none --policy max --samples 2000000000
world-model values --model {recurrent} --out {out} --policy none --policy max --confounding inf
world-model values --model {recurrent} --out {out} --policy none --policy max --confounding -1
world-model values --model {recurrent} --out {out} --policy none --policy max --records {missing}
world-model export --model {missing} --out {out}
world-model export --model {recurrent} --out {out}
world-model export --model {reference} --out {out}
world-model export --model {file} --out {out}
world-model export --model {recurrent} --out {full}
policy train --method iql --episodes {missing} --out {out}
policy train --method iql --episodes {file} --out {out}
policy train --method magic --episodes {cohort} --out {out}
policy train --method iql --episodes {cohort} --out {file}
policy train --method iql --episodes {cohort} --out {full}
policy train --method iql --episodes {cohort} --out {out} --model {recurrent}
policy train --method planner --episodes {cohort} --out {out}
policy train --method planner --episodes {cohort} --model {missing} --out {out}
policy train --method planner --episodes {cohort} --model {recurrent} --critic {policy} --out {out}
policy train --method planner --episodes {cohort} --model {recurrent} --clinician {file} --out {out}
policy train --method ppo --episodes {cohort} --model {policy} --out {out}
policy train --method iql --episodes {cohort} --out {out} --set updates=0
policy train --method iql --episodes {cohort} --out {out} --set seeds=-1
policy train --method iql --episodes {cohort} --out {out} --set learning_rate=nan
policy train --method iql --episodes {cohort} --out {out} --set learning_rate=-1
policy train --method iql --episodes {cohort} --out {out} --set batch_size=0
policy train --method iql --episodes {cohort} --out {out} --set gamma=2
policy train --method iql --episodes {cohort} --out {out} --config {latin.yaml}
policy train --method clinician --episodes {cohort} --out {out} --set model=best
policy train --method clinician --episodes {cohort} --out {out} --set seed=-1
policy describe --policy none --episodes {missing} --out {out}
policy describe --episodes {cohort} --out {out}
policy describe --policy best --episodes {cohort} --out {out}
policy describe --policy {missing} --episodes {cohort} --out {out}
policy describe --policy {recurrent} --episodes {cohort} --out {out}
policy describe --policy {policy-text} --episodes {cohort} --out {out}
policy describe --policy {policy-latin} --episodes {cohort} --out {out}
policy describe --policy {policy-list} --episodes {cohort} --out {out}
policy describe --policy none --episodes {cohort} --out {out} --split holdout
policy describe --policy none --episodes {cohort} --out {file}
policy describe --policy none --episodes {cohort} --out {out} --clinician {missing}
policy describe --policy none --episodes {cohort} --out {out} --clinician {recurrent}
policy describe --policy none --episodes {cohort} --out {out} --seed -1
policy compare --episodes {missing} --model {recurrent} --out {out}
policy compare --episodes {cohort} --model {missing} --out {out}
policy compare --episodes {cohort} --model {recurrent} --out {full}
policy compare --episodes {cohort} --model {recurrent} --out {out} --set methods=[magic]
policy compare --episodes {cohort} --model {recurrent} --out {out} --set patients=1
policy compare --episodes {cohort} --model {recurrent} --out {out} --set samples=-1
policy compare --episodes {cohort} --model {recurrent} --out {out} --set iql.updates=0
policy compare --episodes {cohort} --model {recurrent} --out {out} --set seed=-1
policy compare --episodes {cohort} --model {recurrent} --out {out} --truth --set patients=2000000000
policy export --episodes {missing} --out {out}.npz
policy export --episodes {cohort} --out {out} --format csv
policy export --episodes {cohort} --out {out}.npz --split holdout
policy export --episodes {cohort} --out {out}.npz --past -1
policy export --episodes {cohort} --out {out}.csv
policy export --episodes {cohort} --out {hollow}
policy export --episodes {cohort} --out {full} --format minari
policy export --episodes {cohort} --out {file} --format minari
policy export --episodes {cohort} --out {file}/x.npz
policy sft --llm {missing} --episodes {cohort} --out {out}
policy sft --llm {file} --episodes {cohort} --out {out}
policy sft --llm {hollow} --episodes {cohort} --out {out}
policy sft --llm {recurrent} --episodes {cohort} --out {out}
policy sft --llm {hollow} --episodes {missing} --out {out}
policy sft --llm {hollow} --episodes {cohort} --out {file}
policy sft --llm {hollow} --episodes {cohort} --out {full}
policy sft --llm {hollow} --episodes {cohort} --out {out} --set sft.seed=-1
policy sft --llm {hollow} --episodes {cohort} --out {out} --set sft.training.row_length=0
policy sft --llm {hollow} --episodes {cohort} --out {out} --set sft.training.learner.warmup_steps=-1
policy sft --llm {hollow} --episodes {cohort} --out {out} --config {latin.yaml}
policy bc --llm {hollow} --out {out}
policy bc --llm {hollow} --model {missing} --out {out}
policy bc --llm {hollow} --model {recurrent} --records {hollow} --out {out}
policy bc --llm {hollow} --records {hollow} --out {out}
policy bc --llm {hollow} --records {missing} --out {out}
policy bc --llm {missing} --model {recurrent} --out {out}
policy rl --llm {missing} --model {recurrent} --out {out}
policy rl --llm {hollow} --model {missing} --out {out}
policy rl --llm {hollow} --model {recurrent} --out {file}
policy rl --llm {hollow} --model {recurrent} --out {out} --backend magic
policy rl --llm {hollow} --model {recurrent} --out {out} --backend vllm
policy rl --llm {hollow} --model {recurrent} --out {out} --set rl.samples=0
policy stages --out {file}
policy stages --out {full}
policy stages --out {out} --config {unknown.yaml}
policy stages --out {out} --llm {missing}
policy stages --out {out} --model {missing}
policy stages --out {out} --episodes {missing}
policy stages --out {out} --set patients=0
policy serve --model {missing}
policy serve --model {file}
policy serve --model {hollow}
policy serve --model {hollow} --port -1
policy serve --model {hollow} --port 99999
policy serve --model {hollow} --timeout nan
policy serve --model {hollow} --host 0.0.0.0
agent run --out {out}
agent run --out {out} --backend magic --llm x
agent run --out {out} --llm {missing}
agent run --out {out} --llm {file}
agent run --out {out} --llm {hollow}
agent run --out {out} --backend scripted --model {missing}
agent run --out {out} --backend scripted --model {policy}
agent run --out {out} --backend scripted --episodes {cohort}
agent run --out {out} --backend scripted --model {recurrent} --episodes {missing}
agent run --out {out} --backend scripted --model {recurrent} --behavior {missing}
agent run --out {out} --backend scripted --patients 0
agent run --out {out} --backend scripted --patients -1
agent run --out {out} --backend scripted --patients 2000000000
agent run --out {out} --backend scripted --seed -1
agent run --out {out} --backend scripted --templates {missing}
agent run --out {out} --backend scripted --templates {hollow}
agent run --out {out} --backend scripted --set colour=red
agent run --out {out} --backend scripted --set concurrency=0
agent run --out {out} --backend scripted --set probabilities=true
agent run --out {file} --backend scripted
agent run --out {full} --backend scripted
agent run --out {out} --backend openai --llm x
agent run --out {out} --backend openai --llm x --url nowhere
agent run --out {out} --backend openai --llm x --url http://127.0.0.1:9/v1 --extra word
agent run --out {out} --backend openai --llm x --url http://127.0.0.1:9/v1 --key-file {missing}
agent run --out {out} --backend openai --llm x --url http://127.0.0.1:9/v1 --key-variable NO_KEY
agent show --run {missing}
agent show --run {hollow}
agent show --run {file}
agent show --run {recurrent}
ope --episodes {missing} --policy none --out {out}
ope --episodes {cohort} --out {out}
ope --policy none
ope --episodes {cohort} --policy best --out {out}
ope --episodes {cohort} --policy none --policy none --out {out}
ope --episodes {cohort} --policy a={missing} --out {out}
ope --episodes {cohort} --policy a={table.csv} --out {out}
ope --episodes {cohort} --policy a={zeros.parquet} --out {out}
ope --episodes {cohort} --policy a={binary} --out {out}
ope --episodes {cohort} --policy a={recurrent} --out {out}
ope --episodes {cohort} --policy none --out {file}
ope --episodes {cohort} --policy none --out {full}
ope --episodes {cohort} --policy none --out {out} --behavior magic
ope --episodes {cohort} --policy none --out {out} --behavior {missing}.csv
ope --episodes {cohort} --policy none --out {out} --behavior {twice.csv}
ope --episodes {cohort} --policy p={twice.csv} --out {out}
ope --episodes {cohort} --policy none --config {doubled.yaml} --out {out}
audit --episodes {cohort}/episodes.parquet --out {out}
cohort table --table {doubled.csv} --out {out}
cohort table --table {own.csv} --out {out} --config {doubled.yaml}
world-model train --episodes {cohort} --out {out} --config {doubled.yaml}
simulate --model {recurrent}/manifest.json --episodes {cohort} --out {out}
ope --episodes {cohort} --policy none --out {out} --behavior {table.csv}
ope --episodes {cohort} --policy none --out {out} --model {missing}
ope --episodes {cohort} --policy none --out {out} --model {cohort}
ope --episodes {cohort} --policy none --out {out} --set split=holdout
ope --episodes {cohort} --policy none --out {out} --set clip=nan
ope --episodes {cohort} --policy none --out {out} --set seed=-1
ope --episodes {cohort} --policy none --out {out} --seed -1
ope --episodes {cohort} --policy none --out {out} --config {latin.yaml}
ope benchmark --out {file}
ope benchmark --out {full}
ope benchmark --out {out} --set colour=red
ope benchmark --out {out} --config {missing}
simulate --model {missing} --episodes {cohort} --out {out}
simulate --model {cohort} --episodes {cohort} --out {out}
simulate --model {cut} --episodes {cohort} --out {out}
simulate --model {recurrent} --episodes {missing} --out {out}
simulate --model {recurrent} --episodes {hours} --out {out}
simulate --model {recurrent} --episodes {cohort} --out {file}
simulate --model {recurrent} --episodes {cohort} --out {full}
simulate --model {recurrent} --episodes {cohort} --out {out} --stay 7
simulate --model {recurrent} --episodes {cohort} --out {out} --stay 99999999999999999999
simulate --model {recurrent} --episodes {cohort} --out {out} --step -1
simulate --model {recurrent} --episodes {cohort} --out {out} --step 500
simulate --model {recurrent} --episodes {cohort} --out {out} --horizon 0
simulate --model {recurrent} --episodes {cohort} --out {out} --horizon 2000000000
simulate --model {recurrent} --episodes {cohort} --out {out} --samples 0
simulate --model {recurrent} --episodes {cohort} --out {out} --samples 2000000000
simulate --model {recurrent} --episodes {cohort} --out {out} --plan x=9,9
simulate --model {recurrent} --episodes {cohort} --out {out} --plan nonsense
simulate --model {recurrent} --episodes {cohort} --out {out} --mode quirky
simulate --model {recurrent} --episodes {cohort} --out {out} --mode reference
simulate --model {recurrent} --episodes {cohort} --out {out} --seed -1
sweep --model {missing} --episodes {cohort} --out {out}
sweep --model {recurrent} --episodes {missing} --out {out}
sweep --model {recurrent} --episodes {cohort} --out {file}
sweep --model {recurrent} --episodes {cohort} --out {full}
sweep --model {recurrent} --episodes {cohort} --out {out} --plan nonsense
sweep --model {recurrent} --episodes {cohort} --out {out} --policy best
sweep --model {recurrent} --episodes {cohort} --out {out} --policy {missing}
sweep --model {recurrent} --episodes {cohort} --out {out} --steps x
sweep --model {recurrent} --episodes {cohort} --out {out} --steps -1
sweep --model {recurrent} --episodes {cohort} --out {out} --steps 500
sweep --model {recurrent} --episodes {cohort} --out {out} --every 0
sweep --model {recurrent} --episodes {cohort} --out {out} --steps 1 --every 2
sweep --model {recurrent} --episodes {cohort} --out {out} --horizon 0
sweep --model {recurrent} --episodes {cohort} --out {out} --horizon 2000000000
sweep --model {recurrent} --episodes {cohort} --out {out} --samples -1
sweep --model {recurrent} --episodes {cohort} --out {out} --samples 2000000000
sweep --model {recurrent} --episodes {cohort} --out {out} --then 9,9 --plan deviations
sweep --model {recurrent} --episodes {cohort} --out {out} --split holdout
sweep --model {recurrent} --episodes {cohort} --out {out} --behavior {missing}
sweep --model {recurrent} --episodes {cohort} --out {out} --behavior {recurrent}
sweep --model {recurrent} --episodes {cohort} --out {out} --set precision=half
sweep --model {recurrent} --episodes {cohort} --out {out} --set mode=reference
sweep --model {recurrent} --episodes {cohort} --out {out} --set support=nan
sweep --model {recurrent} --episodes {cohort} --out {out} --set support=2
sweep --model {recurrent} --episodes {cohort} --out {out} --set stays=[7]
sweep --model {recurrent} --episodes {cohort} --out {out} --set stays=7
sweep --model {recurrent} --episodes {cohort} --out {out} --set features=[colour]
sweep --model {recurrent} --episodes {cohort} --out {out} --shard 2/2
sweep --model {recurrent} --episodes {cohort} --out {out} --shard two
sweep --model {recurrent} --episodes {cohort} --out {out} --seed -1
bench --model {missing} --out {out}
bench --model {cohort} --out {out}
bench --out {file}
bench --out {full}
bench --out {out} --precision half
bench --out {out} --only numpy
bench --out {out} --branches 7
bench --out {out} --branches 2147483584
bench --out {out} --plans 0
bench --out {out} --horizon 0
bench --out {out} --repeats 0
bench --out {out} --question-samples 2000000000
profile --model {missing} --out {out}
profile --model {policy} --out {out}
profile --out {file}
profile --out {full}
profile --out {out} --branches 7
profile --out {out} --precision half
profile --out {out} --horizon 0
profile --out {out} --branches 2147483584
""".strip().splitlines()]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case, files, tmp_path, capfd):
    class Places(dict):
        def __missing__(self, name):
            return str(files / name)

    # Names have dots and hyphens, which `str.format` would read as something else.
    words = []
    for word in shlex.split(case):
        before, brace, rest = word.partition("{")
        if brace:
            name, _, after = rest.partition("}")
            place = tmp_path / "out" if name == "out" else files / name
            word = f"{before}{place}{after}"
        words.append(word)
    before = everything(files)
    refuse(call(capfd, *words))
    assert everything(tmp_path) == []
    assert everything(files) == before
