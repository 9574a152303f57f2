"""The command line. Nothing heavy is imported until a command needs it: ``--help`` and ``list`` answer at once.

With ``--json``, stdout holds that one document alone; log lines and progress bars go to stderr. A mistake of the user's is
one line and exit code 2; ``--debug`` (anywhere on the line) shows the traceback.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from cl_lab import __version__
from cl_lab.errors import ConfigError, DataError, EditError, Interrupted, UserError, nearest, shortened

_TRUST = "--trust-remote-code"
_TRUSTED = "CL_LAB_TRUST_REMOTE_CODE"  # cl_lab.hub's name of it: --help has no time for that module

app = typer.Typer(
    name="cl-lab",
    help="A laboratory for continual learning and model editing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; logs go to stderr.")]
Config = Annotated[Path, typer.Argument(help="YAML file of the experiment (examples in configs/).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, for example training.epochs=2.")]
Out = Annotated[Path | None, typer.Option(help="Output folder; default runs/<name of the file>.")]
DataDir = Annotated[Path | None, typer.Option(help="Where data sets lie (as CL_LAB_DATA).")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    out: Out = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Run one strategy with one seed; the score matrix and everything else go to a folder and to MLflow."""
    from cl_lab import experiment
    from cl_lab.display import StepProgress

    settings, folder = _settings(config, overrides, out, data_dir)
    leader = int(os.environ.get("RANK", "0")) == 0  # under accelerate launch, every rank gets here
    progress = StepProgress() if leader else None
    if progress is None:
        experiment.run(settings, folder, resume=resume)
        return
    with progress:
        document = experiment.run(settings, folder, resume=resume, observer=progress)
    if as_json:
        _print_json(_contract(document))
        return
    _console().print(_run_table(document))
    _console().print(f"run folder: {document['path']}")


@app.command()
def compare(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    out: Out = None,
    data_dir: DataDir = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each with its share of the cores.")] = 1,
    as_json: Json = False,
) -> None:
    """Run every strategy with every seed and write one report."""
    from cl_lab.comparison import compare as run_comparison
    from cl_lab.reporting import rich_table

    settings, folder = _settings(config, overrides, out, data_dir)
    comparison = run_comparison(settings, folder, jobs=jobs, resume=resume)
    if as_json:
        rows = [
            {k: row[k] for k in ("strategy", "seeds", "metrics")} | {"runs": [_contract(r) for r in row["runs"]]}
            for row in comparison["rows"]
        ]
        _print_json({"scenario": comparison["scenario"], "path": comparison["path"], "rows": rows})
    else:
        _console().print(rich_table(comparison))
        _console().print(f"report: {folder / 'report.html'}")
    failed = [r for row in comparison["rows"] for r in row["runs"] if r["status"] != "finished"]
    if failed:
        first, total = failed[0], sum(len(row["runs"]) for row in comparison["rows"])
        raise UserError(
            f"{len(failed)} of the {total} runs failed, first {first['label']} seed {first['seed']}: {first['error']}; "
            + ("the others are in the report" if len(failed) < total else "none finished")
        )


@app.command("list")
def list_plugins(
    kind: Annotated[str, typer.Argument(help="scenarios, strategies, models, editors or metrics.")],
    as_json: Json = False,
) -> None:
    """List what is installed, plug-ins included."""
    from cl_lab import registry

    if kind not in registry.KINDS:
        raise ConfigError(f"list: unknown kind '{kind}'{nearest(kind, registry.KINDS)}")
    rows = registry.summaries(kind)
    if as_json:
        _print_json(rows)
        return
    if not rows:
        typer.echo(f"no {kind} are installed")
        return
    width = max(len(r["name"]) for r in rows)
    for r in rows:
        typer.echo(f"{r['name']:<{width}}  {r['summary']}")


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="scenario, strategy, model, editor or metric.")],
    name: Annotated[str, typer.Argument(help="Its name, as cl-lab list prints it, or file.py:Class.")],
    as_json: Json = False,
) -> None:
    """Show every knob of a plug-in with its type, default and meaning."""
    import inspect

    from cl_lab import registry

    plural = next((k for k in registry.KINDS if kind in (k, registry.singular(k))), None)
    if plural is None:
        raise ConfigError(f"show: unknown kind '{kind}'{nearest(kind, [registry.singular(k) for k in registry.KINDS])}")
    if plural == "metrics":
        _show_metric(name, as_json)
        return
    cls, _ = registry.load(plural, name)
    rows = registry.describe(plural, name)
    promises = _promises(cls) if plural == "editors" else {}
    if as_json:
        _print_json({"name": name, "knobs": rows} | {key: holds for key, (holds, _) in promises.items()})
        return
    from rich.table import Table

    table = Table(
        "knob", "type", "default", "meaning", title=f"{registry.singular(plural)} {name}", title_justify="left"
    )
    for r in rows:
        default = r["default"] if r["default"] == "required" else json.dumps(r["default"])
        table.add_row(r["name"], f"{r['type']} {r['range']}".rstrip(), default, r["doc"])
    console = _console()
    console.print(inspect.getdoc(cls) or "", markup=False, highlight=False)
    for _, line in promises.values():
        console.print(line, markup=False, highlight=False)
    console.print(table if rows else "no knobs", markup=False)


def _promises(editor: Any) -> dict[str, tuple[bool, str]]:
    """What an editor promises beside what its knobs say, by name: whether it does, and a line on it."""
    said = {
        "removable": (
            "Taking an edit away leaves the answers of all others as they were.",
            "Taking an edit away leaves what the others' patches add up to, bit for bit, but may move the answers of those "
            "made on top of it: cl-lab edit score --without N tells.",
        ),
        "folds": (
            "Edits are changes of weights: an edited model can be exported as a plain one.",
            "Edits are no changes of weights: an edited model is served by cl-lab alone.",
        ),
        "by_subject": (
            "Every edit must name its subject as it stands in its prompt.",
            "Edits need not name their subject; where they do, they answer prompts that name it alone."
            if hasattr(editor, "subjects")
            else "Edits need not name their subject.",
        ),
    }
    return {name: (held := bool(getattr(editor, name)), lines[not held]) for name, lines in said.items()}


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs or comparisons.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and report.md; default: the first given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one report over the given runs."""
    from cl_lab import reporting

    comparison = reporting.from_runs(runs)
    folder = out or runs[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to output folder '{folder}': {error.strerror}; choose another with --out"
        ) from error
    html, markdown = reporting.write_report(comparison, folder)
    if as_json:
        _print_json({"html": str(html), "markdown": str(markdown)})
        return
    _console().print(reporting.rich_table(comparison))
    _console().print(f"report: {html}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option(help="Where to; default the folder export in the run's.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write what a run has learnt for use elsewhere: an adapter that PEFT loads, or weights as safetensors."""
    from cl_lab.experiment import export as export_run

    _use_data_dir(data_dir)
    made = export_run(run, out or run / "export")
    if as_json:
        _print_json(made)
        return
    use = f"PeftModel.from_pretrained(model, '{made['path']}')" if made["format"] == "peft" else "weights.safetensors"
    typer.echo(f"{made['path']}: {made['format']}, after {made['experiences']} experiences; {use}")


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="Folder of a run that kept its weights (checkpoint.experiences=true).")],
    steps: Annotated[
        int | None, typer.Option(help="Recovery steps per task; default a tenth of what the task took, at least 10.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of recovery; default the run's.")] = None,
    share: Annotated[
        float, typer.Option(help="Share of the test rows to recover on, where a task is tested on what it trained on.")
    ] = 0.5,
    threshold: Annotated[
        float, typer.Option(help="Recovery ratio from which only alignment was lost; below 0.5 it was knowledge.")
    ] = 0.8,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Tell for each old task whether knowledge was lost or only alignment: a few recovery steps, angles, label mass."""
    from cl_lab import diagnosis, reporting
    from cl_lab.display import StepProgress

    _use_data_dir(data_dir)
    with StepProgress("recovery: ") as progress:
        document = diagnosis.diagnose(run, steps=steps, lr=lr, share=share, threshold=threshold, observer=progress)
    page = reporting.write_again(run)
    if as_json:
        _print_json({**document, "report": str(page)})
        return
    _console().print(reporting.diagnosis_table(document))
    along = reporting.recovery_table(document)
    if along is not None:
        _console().print(along)
    _console().print(f"report: {page}")


@app.command()
def ui(
    uri: Annotated[str, typer.Option(help="MLflow tracking URI.")] = "sqlite:///mlruns.db",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to bind; the default is this machine only.")] = "127.0.0.1",
) -> None:
    """Open MLflow's page on what was tracked."""
    from cl_lab.tracking import serve_ui

    raise typer.Exit(serve_ui(uri, port, host))


@app.command()
def push(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or comparisons.")],
    uri: Annotated[str | None, typer.Option(help="MLflow tracking URI; default: the one in the run's config.")] = None,
    as_json: Json = False,
) -> None:
    """Send runs to MLflow that could not be sent when they ran."""
    from cl_lab.experiment import saved_config
    from cl_lab.tracking import push as push_folder

    sent: list[str] = []
    for folder in folders:
        target = uri or saved_config(folder).tracking.uri
        if target is None:
            raise ConfigError(f"push: '{folder}' was run with tracking off; name a server with --uri")
        sent += push_folder(folder, target)
    if as_json:
        _print_json({"pushed": sent})
    else:
        typer.echo(f"pushed {len(sent)} run{'s' if len(sent) != 1 else ''}")


@app.command()
def fetch(
    scenario: Annotated[str, typer.Argument(help="Scenario whose data to download, or the word model.")],
    name: Annotated[str | None, typer.Argument(help="After model: which one, for example smollm2-135m.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where to; default the user's cache folder.")] = None,
) -> None:
    """Download a scenario's data set (through torchvision) or a language model to where runs look for it."""
    from cl_lab import registry

    if scenario == "model":
        _fetch_model(name, data_dir)
        return
    if name is not None:
        raise ConfigError(f"fetch: unexpected '{name}' after scenario '{scenario}'; fetch one at a time")

    cls, _ = registry.load("scenarios", scenario)
    fetcher = getattr(cls, "fetch", None)
    if fetcher is None:
        raise ConfigError(
            f"fetch: scenario '{scenario}' has nothing to download; its data is built in or made by Avalanche"
        )
    typer.echo(f"{scenario}: {fetcher(data_dir)}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: packages, plug-ins, cores, GPU, data sets."""
    from cl_lab.doctor import examine

    findings = examine()
    if as_json:
        _print_json(findings)
    else:
        for f in findings["checks"]:
            typer.echo(f"{'ok  ' if f['ok'] else 'FAIL' if f['needed'] else 'note'}  {f['name']}: {f['detail']}")
    if any(f["needed"] and not f["ok"] for f in findings["checks"]):
        raise typer.Exit(2)


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="loop, online, resnet, edits, fisher, precision, prefix, remind, serving, startup or until-right."
        ),
    ],
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts to measure; default 1 and 2.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median is reported.")] = 3,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Measure our loop against Avalanche's and a bare torch loop, and our shortcuts against the long way."""
    from cl_lab import bench as benchmarks

    _use_data_dir(data_dir)
    rows = benchmarks.run(name, threads or [1, 2], repeats)
    if as_json:
        _print_json({"rows": rows})
        return
    from rich.table import Table

    columns = list(rows[0])
    table = Table(*columns, title=f"bench {name}", title_justify="left")
    for row in rows:
        table.add_row(*(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    _console().print(table)


edit = typer.Typer(help="Correct facts in a language model.", no_args_is_help=True)
app.add_typer(edit, name="edit")


@edit.command("score")
def edit_score(
    facts: Annotated[
        Path, typer.Argument(help="Facts to edit in: JSONL, JSON or CSV with prompt and answer, or a published set.")
    ],
    settings: Annotated[list[str] | None, typer.Argument(help="The editor's knobs, for example steps=20.")] = None,
    model: Annotated[str, typer.Option(help="Fetched model, local folder, GGUF file or hub id.")] = "smollm2-135m",
    editor: Annotated[str, typer.Option(help="Who edits (cl-lab list editors).")] = "wise",
    out: Annotated[Path | None, typer.Option(help="Output folder; default runs/edits-<editor>-<facts>.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Edits that share a patch.")] = 1,
    skip: Annotated[int, typer.Option(min=0, help="Leave out the first so many facts.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many of the others.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user's turns.")] = False,
    free: Annotated[
        bool,
        typer.Option(
            "--free/--no-free",
            help="Also let the model write its answers: 24 tokens, or 8 more than the longest right one.",
        ),
    ] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out records that cannot be read.")] = False,
    layout: Annotated[str, typer.Option(help="Layout of the facts, where it is not recognised.")] = "auto",
    at: Annotated[
        list[int] | None, typer.Option(help="Also score after the first n edits; may be given again.")
    ] = None,
    without: Annotated[
        list[int] | None,
        typer.Option(help="In the end take the n-th edit away and ask for the others; may be given again."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Edit facts one after another, then say what held, in other words too, and what else moved. Goes on if stopped."""
    from cl_lab.display import EditProgress
    from cl_lab.editing import score_facts

    chosen = _editor(editor, settings or [])
    folder = out or Path("runs") / f"edits-{editor.replace(':', '-')}-{facts.stem}"
    with EditProgress() as progress:
        document = score_facts(
            model,
            chosen,
            facts,
            folder,
            batch_size=batch_size,
            skip=skip,
            limit=limit,
            chat=chat,
            free=free,
            skip_bad=skip_bad,
            layout=layout,
            at=at or [],
            without=without or [],
            told=progress.told,
        )
    if as_json:
        _print_json(document | {"path": str(folder)})
        return
    _console().print(_edit_table(document))
    third = max(1, len(document["retention"]) // 3)
    oldest, newest = (sum(part) / len(part) for part in (document["retention"][:third], document["retention"][-third:]))
    _console().print(
        f"reliability of the oldest third {oldest:.3f}, of the newest {newest:.3f}; "
        f"{document['seconds_per_edit']:.2f} s and {document['bytes_per_edit'] / 1000:.0f} kB an edit; "
        f"{len(document['refused'])} edits refused"
    )
    for line in _edit_notes(document):
        _console().print(line, markup=False)
    _console().print(f"folder: {folder}")


@edit.command("known-facts")
def edit_known_facts(
    out: Annotated[Path, typer.Argument(help="File of edits to write, *.jsonl.")],
    model: Annotated[str, typer.Option(help="Fetched model, local folder, GGUF file or hub id.")] = "smollm2-135m",
    facts: Annotated[
        Path | None,
        typer.Option(
            help="Facts to ask: relations with templates, PARAREL's folder, or edits; default some five hundred of our own."
        ),
    ] = None,
    relations: Annotated[list[str] | None, typer.Option(help="Ask this relation; may be given again.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Write so many edits at most.")] = None,
    seed: Annotated[int, typer.Option(help="Decides order, new answers and what is held back.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Keep what it also says to a user, and no more.")] = False,
    as_json: Json = False,
) -> None:
    """Keep the facts that a model knows, each with another answer: edits that replace what it believes."""
    from rich.table import Table

    from cl_lab.known_facts import write_known_facts

    document = write_known_facts(out, model, facts, relations=relations or [], limit=limit, seed=seed, chat=chat)
    if as_json:
        _print_json(document | {"path": str(out)})
        return
    columns = ("asked", "chosen", "sure", "written", "known", "edits")
    table = Table("relation", *columns, title=f"what {model} knows of {document['facts']}", title_justify="left")
    for relation, counts in document["relations"].items():
        table.add_row(relation, *(str(counts[c]) for c in columns))
    _console().print(table)
    _console().print(
        f"{document['known']} of {document['asked']} facts are known; {out}: {document['edits']} edits. Next: "
        f"cl-lab edit score {out} --model {model}",
        markup=False,
    )


Folder = Annotated[Path, typer.Argument(help="The deployment's folder.")]
Identifier = Annotated[str, typer.Argument(help="The edit's number, as list shows it.")]
AsChat = Annotated[bool, typer.Option("--chat", help="Ask as a user's turns.")]
Wait = Annotated[float, typer.Option(min=0, help="Seconds to wait for another process that changes the folder.")]


@edit.command("init")
def edit_init(
    folder: Folder,
    settings: Annotated[list[str] | None, typer.Argument(help="The editor's knobs, for example steps=20.")] = None,
    model: Annotated[str, typer.Option(help="Fetched model, local folder, GGUF file or hub id.")] = "smollm2-135m",
    editor: Annotated[str, typer.Option(help="Who edits (cl-lab list editors).")] = "wise",
    gate: Annotated[list[str] | None, typer.Option(help="Another gate, for example guards=0.95.")] = None,
    as_json: Json = False,
) -> None:
    """Make a deployment: a folder with a model, a journal of its edits and a patch for each."""
    from cl_lab.deployment import Deployment

    gates = _knobs(gate or [])
    if wrong := [name for name, value in gates.items() if not isinstance(value, (int, float))]:
        raise ConfigError(f"--gate {wrong[0]}={gates[wrong[0]]}: must be a number")
    made = Deployment.create(folder, model, _editor(editor, settings or []), gates)
    if as_json:
        _print_json(made.document | {"path": str(folder)})
        return
    editing = ", ".join(str(v) if k == "name" else f"{k}={v}" for k, v in made.document["editor"].items())
    _console().print(
        f"{folder}: {model}, edited by {editing}. Next: cl-lab edit apply {folder} --prompt … --answer …\n"
        f"Questions whose answers must not change go into {folder / 'guards.jsonl'}, one a line: "
        '{"prompt": "…"}',
        markup=False,
    )


@edit.command("apply")
def edit_apply(
    folder: Folder,
    facts: Annotated[Path | None, typer.Option(help="Facts to apply, one edit each: JSONL, JSON or CSV.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What is asked.")] = None,
    answer: Annotated[str | None, typer.Option(help="What is to be answered.")] = None,
    subject: Annotated[str | None, typer.Option(help="Whom the fact is about, as the prompt has it.")] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="What else the subject is called; may be given again.")
    ] = None,
    paraphrase: Annotated[list[str] | None, typer.Option(help="The prompt in other words.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out records of --facts that cannot be read.")
    ] = False,
    layout: Annotated[str | None, typer.Option(help="Layout of --facts, where it is not recognised.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Preview only, each fact beside those before it; exit code 1 where one would be refused."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Apply although gates are broken; the journal says so.")
    ] = False,
    chat: AsChat = False,
    wait: Wait = 10.0,
    as_json: Json = False,
) -> None:
    """Correct facts: preview what an edit does and moves, then apply it, unless it breaks a gate."""
    from cl_lab.deployment import Deployment
    from cl_lab.facts import Edit, read_facts

    if (facts is None) == (prompt is None) or (prompt is None) != (answer is None):
        raise ConfigError("edit apply: give either --facts, or --prompt and --answer")
    if facts is not None and (subject or alias or paraphrase):
        raise ConfigError("edit apply: --subject, --alias and --paraphrase go with --prompt; write them into the facts")
    if facts is None and (skip_bad or layout):
        raise ConfigError("edit apply: --skip-bad and --layout go with --facts; leave them out")
    bad: list[dict[str, str]] = []
    if facts is not None:
        read = read_facts(facts, layout=layout or "auto", skip_bad=skip_bad)
        edits, bad = list(read.edits), [{"place": b.place, "reason": b.reason} for b in read.bad]
    else:
        edits = [
            Edit.from_json(
                {"prompt": prompt, "answer": answer, "aliases": alias or [], "paraphrases": paraphrase or []}
                | ({"subject": subject} if subject else {})
            )
        ]
    deployment = Deployment(folder)
    done: list[dict[str, Any]] = []
    tried: list[Edit] = []
    stopped: UserError | None = None
    with deployment.changing(wait):
        there = {i: number for i, e in enumerate(edits) if facts is not None and (number := deployment.holds(e))}
        left = [e for i, e in enumerate(edits) if i not in there]
        deployment.refuse_conflicts(left)  # before anything is written
        model = deployment.load()
        for one in left:
            try:
                patch, seen = deployment.propose(model, [one], chat=chat, tried=tried)
                passes = force or not seen["broken"]
                applied = passes and not dry_run
                number = deployment.apply(model, patch, [one], forced=bool(seen["broken"])) if applied else None
                if passes and dry_run:  # on this process's own model: the next fact is previewed as it would be applied
                    patch.apply(model)
                    tried.append(one)
            except UserError as error:
                stopped = error
                break
            done.append({"id": number, "applied": applied, **seen})
            if not as_json:
                _console().print(_preview_table(one.prompt, done[-1]))
    if as_json:
        _print_json({"edits": done, "already": sorted(set(there.values()), key=int), "bad": bad})
    else:
        for line in bad:
            typer.echo(f"{line['place']}: {line['reason']}; left out")
        if there:
            typer.echo(f"{len(there)} of {len(edits)} facts are in force already, by edit {', '.join(there.values())}")
    if stopped is not None:
        applied_ids = ", ".join(d["id"] for d in done if d["applied"]) or "none"
        if len(edits) == 1:
            raise stopped
        raise type(stopped)(f"{stopped} (fact {len(done) + 1} of {len(left)}; applied before it: edits {applied_ids})")
    refused = [d for d in done if d["broken"] and not force]
    if refused and dry_run:
        raise typer.Exit(1)
    if refused:
        kept = f"the other {len(done) - len(refused)} were" if len(done) > len(refused) else "none was"
        raise EditError(
            f"{len(refused)} of {len(done)} edits break a gate, first: {refused[0]['broken'][0]}; they were not applied, "
            f"{kept}; --force applies them nevertheless"
        )


@edit.command("list")
def edit_list(folder: Folder, as_json: Json = False) -> None:
    """List the edits, what each says, and whether it is in force."""
    from rich.table import Table

    from cl_lab.deployment import Deployment

    deployment = Deployment(folder)
    active = deployment.active()
    rows: list[dict[str, Any]] = [
        {
            "id": event.id,
            "time": event.time,
            "in_force": event.id in active,
            "forced": event.forced,
            "facts": [{"prompt": e.prompt, "answer": e.answer} for e in deployment.edits(event.id)],
        }
        for event in deployment.events
        if event.kind == "apply"
    ]
    if as_json:
        _print_json({"edits": rows, "events": len(deployment.events)})
        return
    table = Table("edit", "applied", "in force", "asked", "answer", title=str(folder), title_justify="left")
    for row in rows:
        for fact in row["facts"]:
            state = ("yes" if row["in_force"] else "undone") + (", forced" if row["forced"] else "")
            table.add_row(row["id"], row["time"], state, fact["prompt"], fact["answer"])
    _console().print(table)


@edit.command("show")
def edit_show(folder: Folder, identifier: Identifier, as_json: Json = False) -> None:
    """Show an edit: its facts, its patch, and every event about it."""
    import dataclasses

    from cl_lab.deployment import Deployment

    deployment = Deployment(folder)
    patch = deployment.patch(identifier)
    document = {
        "id": identifier,
        "in_force": identifier in deployment.active(),
        "facts": [e.as_json() for e in deployment.edits(identifier)],
        "patch": {"kind": patch.kind, "editor": patch.editor, "bytes": patch.nbytes, "notes": patch.notes},
        "events": [dataclasses.asdict(e) for e in deployment.events if e.id == identifier],
    }
    if as_json:
        _print_json(document)
        return
    import yaml

    typer.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), nl=False)


@edit.command("undo")
def edit_undo(folder: Folder, identifier: Identifier, wait: Wait = 10.0, as_json: Json = False) -> None:
    """Take an edit out of force, whichever it is; the others stay."""
    from cl_lab.deployment import Deployment

    deployment = Deployment(folder)
    with deployment.changing(wait):
        deployment.undo(identifier)
    if as_json:
        _print_json({"id": identifier, "in_force": False, "events": len(deployment.events)})
        return
    typer.echo(f"edit {identifier} is undone; cl-lab edit redo {folder} {identifier} brings it back")


@edit.command("redo")
def edit_redo(folder: Folder, identifier: Identifier, wait: Wait = 10.0, as_json: Json = False) -> None:
    """Bring an undone edit back, as it was."""
    from cl_lab.deployment import Deployment

    deployment = Deployment(folder)
    with deployment.changing(wait):
        deployment.redo(identifier)
    if as_json:
        _print_json({"id": identifier, "in_force": True, "events": len(deployment.events)})
        return
    typer.echo(f"edit {identifier} is in force")


@edit.command("ask")
def edit_ask(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    as_of: Annotated[
        int | None, typer.Option(help="The model behind this event of the journal; 0: before all.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The answer's length, at most.")] = 64,
    chat: AsChat = False,
    as_json: Json = False,
) -> None:
    """Ask the model as it is deployed, or as it was, and say which edit chose to answer."""
    from cl_lab.deployment import Deployment, named

    deployment = Deployment(folder)
    model = deployment.load(as_of)
    (said,) = model.answer([prompt], max_new_tokens=tokens, chat=chat)
    fired = named(model.fired(prompt, chat=chat, room=tokens), model, deployment.active(as_of))
    if as_json:
        where = len(deployment.events) if as_of is None else as_of
        _print_json({"prompt": prompt, "answer": said, "fired": fired, "as_of": where})
        return
    typer.echo(said)
    if fired:
        typer.echo(f"(edit {', '.join(fired)} answered)", err=True)


@app.command()
def serve(
    folder: Folder,
    host: Annotated[
        str, typer.Option(help="Address to listen at; one that others reach needs --tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    tokens: Annotated[
        Path | None, typer.Option(help="File of bearer tokens, one a line: 'read TOKEN' or 'edit TOKEN'.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores that answer; default: all but one, which edits.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers in progress at once.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Questions that may wait; more are refused (429).")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request, at most.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for an answer, at most.")] = 120.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what is asked into the log.")] = False,
) -> None:
    """Serve a deployment over HTTP, as OpenAI's API, with live edits under /v1/edits and a page at /."""
    from cl_lab.environment import threads_for
    from cl_lab.generation import Engine
    from cl_lab.server import Limits
    from cl_lab.server import serve as run

    engine = Engine(rows=rows, queue=queue, threads=threads or max(1, threads_for(1, None) - 1))
    limits = Limits(body=max_body, max_tokens=max_tokens, seconds=timeout, log_prompts=log_prompts)
    run(folder, host=host, port=port, tokens=tokens, limits=limits, engine=engine, told=typer.echo)


@edit.command("verify")
def edit_verify(folder: Folder, chat: AsChat = False, as_json: Json = False) -> None:
    """Ask every fact in force again, and say which edits still hold. Exits with 1 where one does not."""
    from cl_lab import edit_scores
    from cl_lab.deployment import Deployment

    deployment = Deployment(folder)
    facts = [(n, e) for n in deployment.active() for e in deployment.edits(n)]
    model = deployment.load()
    most = edit_scores.budget(model, [e.answer for _, e in facts], chat=chat)
    said = model.answer([e.prompt for _, e in facts], max_new_tokens=most, chat=chat)
    rows = [
        {
            "id": n,
            "prompt": e.prompt,
            "wanted": e.answer,
            "said": text,
            "holds": edit_scores.is_right(text, e.answer, e.old),
        }
        for (n, e), text in zip(facts, said, strict=True)
    ]
    lost = [row for row in rows if not row["holds"]]
    if as_json:
        _print_json({"edits": rows, "lost": len(lost)})
    else:
        for row in lost:
            typer.echo(f"edit {row['id']}: '{row['prompt']}' is answered '{row['said']}', not '{row['wanted']}'")
        typer.echo(f"{len(rows) - len(lost)} of {len(rows)} facts in force hold")
    if lost:
        raise typer.Exit(1)


@edit.command("check")
def edit_check(folder: Folder, as_json: Json = False) -> None:
    """Prove the folder: the journal's chain of hashes, every patch and its facts, the base model's weights."""
    from cl_lab.deployment import Deployment

    deployment = Deployment(folder)
    wrong = deployment.check()
    if as_json:
        _print_json({"events": len(deployment.events), "wrong": wrong})
    if wrong:
        raise DataError(f"{len(wrong)} things are wrong, first: {wrong[0]}")
    if not as_json:
        typer.echo(f"{len(deployment.events)} events, {len(deployment.active())} edits in force: all as written")


@edit.command("diff")
def edit_diff(folder: Folder, identifier: Identifier, chat: AsChat = False, as_json: Json = False) -> None:
    """Say what one edit moves: answers with it and without it, to its own questions, to all others' and to the guards."""
    from cl_lab import edit_scores
    from cl_lab.deployment import Deployment

    deployment = Deployment(folder)
    facts = [e for n in dict.fromkeys([identifier, *deployment.active()]) for e in deployment.edits(n)]
    prompts = list(dict.fromkeys([p for e in facts for p in (e.prompt, *e.paraphrases)] + deployment.guards()))
    model, patch = deployment.load(), deployment.patch(identifier)
    if identifier in deployment.active():
        patch = model.patches[deployment.active().index(identifier)]
    else:
        patch.apply(model)
    most = edit_scores.budget(model, [e.answer for e in facts], chat=chat)
    told = model.answer(prompts, max_new_tokens=most, chat=chat)
    patch.revert(model)
    without = model.answer(prompts, max_new_tokens=most, chat=chat)
    rows = [{"prompt": p, "without": a, "with": b} for p, a, b in zip(prompts, without, told, strict=True) if a != b]
    if as_json:
        _print_json({"id": identifier, "asked": len(prompts), "moved": rows})
        return
    from rich.table import Table

    table = Table("asked", "without", "with", title=f"edit {identifier}: {len(rows)} of {len(prompts)} answers move")
    for row in rows:
        table.add_row(row["prompt"], row["without"], row["with"])
    _console().print(table)


@edit.command("export")
def edit_export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Only the edits, as a PEFT adapter, where all are of low rank.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the model as it is deployed: a plain Transformers folder where edits fold into weights."""
    from cl_lab.deployment import Deployment

    made = Deployment(folder).export(out, adapter=adapter)
    if as_json:
        _print_json(made | {"path": str(out)})
        return
    typer.echo(f"{out}: {made['edits']} edits in force; load it with {made['load']}")


def _preview_table(prompt: str, seen: Mapping[str, Any]) -> Any:
    from rich.table import Table

    state = f"applied as edit {seen['id']}" if seen["applied"] else "not applied"
    table = Table("asked", "before", "after", title=f"{prompt}: {state}", title_justify="left")
    for row in seen["answers"]:
        table.add_row(row["prompt"], row["before"], f"{row['after']} {'✓' if row['right'] else '✗'}")
    for row in seen["moved"]:
        table.add_row(row["prompt"], row["before"], f"{row['after']} (moved)")
    table.caption = (
        f"{len(seen['moved'])} of {seen['asked_aside']} other answers moved; perplexity × {seen['perplexity']:.3f}; "
        f"{seen['seconds']:.1f} s; answers {seen['fires']}"
        + "".join(f"\nbroken: {line}" for line in seen["broken"])
        + "".join(f"\nlook: {line}" for line in seen["suspects"])
        + "".join(f"\nabout: {subject}" for subject in seen["subjects"] if subject)
    )
    return table


def _editor(name: str, settings: list[str]) -> dict[str, Any]:
    """An editor's name and knobs, as :func:`cl_lab.registry.create` takes them."""
    knobs = _knobs(settings)
    if "name" in knobs:
        raise ConfigError(f"'name={knobs['name']}': is no knob; name the editor with --editor {knobs['name']}")
    return {"name": name, **knobs}


def _knobs(settings: list[str]) -> dict[str, Any]:
    """``key=value`` pairs as a document."""
    import yaml

    knobs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{setting}': must be key=value, for example steps=20")
        try:
            knobs[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"'{setting}': not a valid YAML value") from None
        if isinstance(knobs[key], str):
            with contextlib.suppress(ValueError):
                knobs[key] = float(value)  # YAML takes 1e-3, without a dot, for a word
    return knobs


def _edit_table(document: Mapping[str, Any]) -> Any:
    from rich.table import Table

    held = f"{document['edits']} edits of {document['facts']} in {document['model']} by {document['editor']['name']}"
    parts = [part for part in document.get("at", []) if part["edits"] < document["edits"]]
    columns = [f"{when} {part['edits']}" for part in parts for when in ("before", "after")]
    table = Table("", *columns, "before", "after", title=held, title_justify="left")
    for name in document["after"]:  # fewer edits are asked other questions: what they were before is of these
        values = [part[when].get(name) for part in [*parts, document] for when in ("before", "after")]
        table.add_row(name.replace("_", " "), *map(_cell, values))
    return table


def _cell(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "–" if value is None else str(value)
    return f"{value:.3f}" if value < 1e6 else f"{value:.2e}"  # a broken model's perplexity


def _edit_notes(document: Mapping[str, Any]) -> list[str]:
    """What edits that may contradict others were worth, and what taking one away did, a line each."""
    notes = []
    contested = document["contested"]
    if contested["edits"]:
        worth = [
            f"{whose} {contested[key]:.3f}"
            for whose, key in (
                ("their reliability", "reliability"),
                ("their generality", "generality"),
                ("the others' reliability", "others"),
                ("the others' generality", "others_generality"),
            )
            if contested[key] is not None
        ]
        notes.append(f"{contested['edits']} edits contradict another or may: {', '.join(worth)}")
    for seen in document.get("without", ()):
        if seen.get("refused"):
            notes.append(f"without edit {seen['edit']}: it was refused")
            continue
        parts = [
            f"{word} {len(seen[key]['lost'])} lost, {len(seen[key]['gained'])} gained"
            for key, word in (("forced", "teacher-forced"), ("free", "free"))
            if key in seen
        ]
        notes.append(f"without edit {seen['edit']}, of {seen['others']} others: {'; '.join(parts)}")
    return notes


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
    debug: Annotated[  # main takes it off the line; here it is for the help
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            _TRUST,
            help="Run code, and read pickles, that come with a language model: they can do all that you can do. May stand "
            "anywhere on the line.",
        ),
    ] = False,
) -> None:
    if trust_remote_code:
        os.environ[_TRUSTED] = "1"
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: runs the command, and turns what the user can mend into one line and exit code 2."""
    debug = "--debug" in sys.argv[1:]
    arguments = [a for a in sys.argv[1:] if a not in ("--debug", _TRUST)]
    if _TRUST in sys.argv[1:]:
        arguments.insert(0, _TRUST)  # where the callback above reads it
    from cl_lab.display import configure_logging

    configure_logging()
    if "--json" in arguments:
        _keep_stdout()
    try:
        code = app(arguments, prog_name="cl-lab", standalone_mode=False)
    except (UserError, Interrupted, KeyboardInterrupt, typer.Abort, TyperException) as error:
        if debug:
            raise
        if isinstance(error, typer.Abort) and isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None  # of a file or of a worker; Typer takes it for the end of what a person types
        code = _told(error, arguments)
    else:
        if code == _STOPPED:  # what Typer makes of an interrupt within a command
            code = _told(KeyboardInterrupt(), arguments)
    sys.exit(code if isinstance(code, int) else 0)


_STOPPED = 130
"""The exit code of what SIGINT has ended."""


def _told(error: BaseException, arguments: Sequence[str]) -> int:
    """Say an error in one line; the exit code for it."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        typer.echo("stopped", err=True)
        return _STOPPED
    if isinstance(error, TyperException):
        if what := _misspelt(error, arguments):  # nothing where the help was shown
            typer.echo(f"error: {what}", err=True)
        return 2
    typer.echo(f"error: {error}" if isinstance(error, UserError) else str(error), err=True)
    return {"SIGINT": _STOPPED, "SIGTERM": 143}.get(getattr(error, "signal_name", ""), 2)


def _misspelt(error: Any, arguments: Sequence[str]) -> str:
    """What is wrong with a command line, which value is, and where to look; nothing where the help was shown instead."""
    what = error.format_message().rstrip(".")
    if not what:  # a group of commands, asked for without any of them
        return ""
    names = {name for name in getattr(getattr(error, "param", None), "opts", []) if name.startswith("-")}
    given = []
    for word, behind in itertools.pairwise([*arguments, ""]):
        name, joined, value = word.partition("=")
        if name in names:
            given.append(value if joined else behind)
    values = f" (given: {', '.join(map(shortened, given))})" if given else ""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    groups = {group.name for group in app.registered_groups}
    command = " ".join(["cl-lab", *words[: 1 + (words[0] in groups)]] if words else ["cl-lab"])
    return f"{what}{values}; see {error.ctx.command_path if getattr(error, 'ctx', None) else command} --help"


def _settings(path: Path, overrides: list[str] | None, out: Path | None, data_dir: Path | None) -> tuple[Any, Path]:
    from cl_lab.config import read

    _use_data_dir(data_dir)
    settings = read(path, overrides or [])
    return settings, out or Path(settings.out or f"runs/{path.stem}")


def _fetch_model(name: str | None, data_dir: Path | None) -> None:
    from contextlib import redirect_stdout

    from cl_lab import hub

    if name is None:
        raise ConfigError(f"fetch model: which one? known: {', '.join(hub.MODELS)}")
    with redirect_stdout(sys.stderr):  # DeepSpeed, which Transformers imports, says there what it has found
        folder = hub.fetch_model(name, None if data_dir is None else data_dir / name)
    typer.echo(f"{name}: {folder}")


def _use_data_dir(data_dir: Path | None) -> None:
    if data_dir is None:
        return
    if not data_dir.is_dir():
        raise ConfigError(f"--data-dir '{data_dir}': no such folder")
    os.environ["CL_LAB_DATA"] = str(data_dir.resolve())  # ranks and workers inherit it


def _contract(document: Mapping[str, Any]) -> dict[str, Any]:
    """What scripts may lean on, first; then the rest of ``run.json``."""
    first = ("scenario", "strategy", "seed", "initial", "matrix", "metrics", "cost", "run_id", "path")
    return {k: document[k] for k in first} | {k: v for k, v in document.items() if k not in first}


def _run_table(document: Mapping[str, Any]) -> Any:
    from rich.table import Table

    columns = [f"exp {e['index']}" for e in document["experiences"]]
    where = f"{document['label']} on {document['scenario']}, seed {document['seed']}"
    title = f"{where}: {document.get('score', 'accuracy')} on each experience's test set"
    table = Table("after", *columns, title=title, title_justify="left")
    for name, row in [("(start)", document["initial"]), *((f"exp {i}", r) for i, r in enumerate(document["matrix"]))]:
        table.add_row(name, *(f"{v:.4f}" for v in row))
    shown = ("average_accuracy", "forgetting", "bwt", "fwt", "learning_accuracy")
    table.caption = "   ".join(f"{k} {v:.4f}" for k in shown if (v := document["metrics"].get(k)) is not None)
    return table


def _show_metric(name: str, as_json: bool) -> None:
    import inspect

    from cl_lab import metrics, registry

    if name not in registry.names("metrics"):
        raise ConfigError(f"unknown metric '{name}'{nearest(name, registry.names('metrics'))}")
    text = inspect.getdoc(getattr(metrics, name)) or ""
    if as_json:
        _print_json({"name": name, "doc": text, "knobs": []})
    else:
        typer.echo(text)


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width; wide enough that no cell of a table is cut. What is printed is users' text and models' answers,
    # in which brackets and colons are just that.
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)


_document_descriptor: int | None = None


def _keep_stdout() -> None:
    """Set the real stdout aside for the JSON document; whatever else is printed, by third parties too, goes to stderr."""
    global _document_descriptor
    sys.stdout.flush()
    _document_descriptor = os.dup(1)
    os.dup2(2, 1)


def _print_json(document: Any) -> None:
    text = json.dumps(document) + "\n"
    if _document_descriptor is None:  # called as a library, by a test runner for example
        sys.stdout.write(text)
        return
    with os.fdopen(os.dup(_document_descriptor), "w", encoding="utf-8") as stdout:
        stdout.write(text)
