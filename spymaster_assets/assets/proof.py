"""calibration_report, walk_forward_report: what the served artifacts are worth on sessions they have not seen."""

from collections.abc import Sequence
from typing import Any

import dagster as dg
import polars as pl

from spymaster_assets.assets.canaries import require_canaries
from spymaster_assets.assets.common import Made, check_each, each_partition, require_one_origin
from spymaster_assets.assets.datasets import read_part
from spymaster_assets.assets.signals import label_counts
from spymaster_assets.assets.windows import judged_window, keyed_by_session, session_partitions
from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.sequences import read_sequences
from spymaster_assets.datasets.splits import read_split
from spymaster_assets.errors import ArtifactError, MissingInputError
from spymaster_assets.evaluation import plots
from spymaster_assets.evaluation.calibration import baseline_predictions, judge, trials, with_outcomes
from spymaster_assets.evaluation.report import ReportData, canary_rows, render_report
from spymaster_assets.market.bars import read_bars
from spymaster_assets.models.base import SequenceData, prediction_frame
from spymaster_assets.models.trees import BoostedTrees
from spymaster_assets.partitions import SESSION_ASSETS, all_sessions, calendar_of, scheduled_asof
from spymaster_assets.resources import ArtifactRoot, Trackers
from spymaster_assets.retrieval.index import RetrievalIndex
from spymaster_assets.settings import Settings, fingerprint
from spymaster_assets.signals.build import read_signals
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.signals.levels import levels_from_files
from spymaster_assets.store import REPORT_KEY, ArtifactStore, dump_json, git_revision, provenance
from spymaster_assets.tables import parquet_bytes
from spymaster_assets.tracking import run_name, track

_SHOWN_HEADS = 9


def proof_assets(settings: Settings) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Assets and checks of the group 'proof' for one deployment."""
    partitions = session_partitions(settings)
    contract = load_contract()
    window = judged_window(settings)

    @dg.asset(
        **keyed_by_session(settings, "proof"),
        deps=[
            "patchtst_model",
            "tree_bundles",
            "retrieval_index",
            "split_manifest",
            "canaries",
            dg.AssetDep("signals", partition_mapping=window),
            dg.AssetDep("sequence_dataset", partition_mapping=window),
        ],
        kinds={"json"},
        code_version=fingerprint(settings.split, contract.sha256, "2"),
        description="Brier, skill, log loss, ECE and reliability of every head on the test sessions of this as-of session, from the stored "
        "artifacts, beside base rate, logistic regression, time of day and random neighbours.",
    )
    def calibration_report(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, trackers: Trackers
    ) -> dg.MaterializeResult[Any]:
        tracking = trackers.settings

        def make(key: str) -> Made:
            store = artifacts.store
            split, split_artifact = read_split(store, key)
            canaries = require_canaries(store, split_artifact)
            missing = [k for k in split.test if not store.exists("sequence_dataset", k)]
            if missing:
                raise MissingInputError(
                    f"{len(missing)} of {len(split.test)} test sessions are not in: {', '.join(missing)}",
                    where=f"fold as of {key}",
                    remedy=f"dagster asset materialize --select {','.join(SESSION_ASSETS)} --partition-range {missing[0]}...{missing[-1]}",
                )
            predictions, inputs = predict_all(store, key, split.test)
            train = read_part(store, split, "train")
            test = pl.concat([read_signals(store, k)[0].frame for k in split.test])
            both = [predictions, baseline_predictions(train, test, contract, settings.tree.stages)]
            outcomes = with_outcomes(pl.concat(both, how="diagonal"), test, train, contract, key)
            entries = judge(outcomes)
            report = {
                "asof": key,
                "simulated": settings.simulated,
                "label_mode": settings.label.mode,
                "test_sessions": list(split.test),
                "train_rows": train.height,
                "test_rows": test.height,
                "trials": trials(entries),
                "heads": entries,
                "skipped": store.load("tree_bundles", key).json("metadata.json")["skipped"],
            }
            chosen = [e for e in entries if e["reliability"] and not e["baseline"]][:_SHOWN_HEADS]
            curves = plots.reliability_curves({head_name(e): e["reliability"] for e in chosen}, settings.simulated)
            files = {
                "calibration.json": dump_json(report),
                "predictions.parquet": parquet_bytes(outcomes),
                "reliability.png": curves,
            }
            name = run_name("calibration", contract.schema_version, split.test[0], split.test[-1], key)
            with track(
                tracking,
                experiment="spymaster_calibration",
                run_name=name,
                params={"asof": key, "test_sessions": list(split.test)},
                tags={
                    "asof": key,
                    "git_revision": git_revision(),
                    "dataset_hash": fingerprint(inputs),
                    "simulated": str(settings.simulated).lower(),
                },
            ) as run:
                for e in entries:
                    run.log_metrics({head_name(e): e["metrics"]})
                for file, data in files.items():
                    run.log_artifact(data, file)
            artifact = store.publish(
                "calibration_report",
                key,
                files,
                inputs={"split_manifest": split_artifact.sha256, "canaries": canaries.sha256, **inputs},
                metadata=dict(run.ids),
                settings=settings.of("split", "label"),
            )
            return Made(
                artifact,
                {
                    "test_rows": test.height,
                    "test_sessions": dg.MetadataValue.json(list(split.test)),
                    "scores": dg.MetadataValue.md(score_table(entries)),
                    "reliability": dg.MetadataValue.md(plots.png_markdown(curves)),
                    "simulated": settings.simulated,
                },
            )

        return each_partition(context, make)

    @dg.asset(
        group_name="proof",
        deps=[
            dg.AssetDep("calibration_report", partition_mapping=dg.AllPartitionMapping()),
            dg.AssetDep("canaries", partition_mapping=dg.AllPartitionMapping()),
        ],
        kinds={"html"},
        code_version=fingerprint(settings.split, settings.label, contract.sha256, "2"),
        description="All folds together: one self-contained HTML report with base rates, baselines, intervals and the number of trials.",
    )
    def walk_forward_report(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult[Any]:
        store = artifacts.store
        judged = set(store.keys("calibration_report"))
        canaries = {k: store.load("canaries", k) for k in scheduled_asof(settings) if k in judged}
        verdicts = {k: artifact.json("canaries.json") for k, artifact in canaries.items()}
        folds = [k for k, report in verdicts.items() if not report["failed"]]
        if not folds:
            raise MissingInputError(
                "no fold of the retraining schedule has been judged, with canaries that hold",
                where=str(store.root / "calibration_report"),
                remedy="dagster asset materialize --select calibration_report --partition <as-of session>; `spymaster status` names them",
            )
        reports = {report.key: report for report in store.require("calibration_report", folds)}
        if stale := [k for k, report in reports.items() if report.inputs.get("canaries") != canaries[k].sha256]:
            raise ArtifactError(
                f"calibration_report [{stale[0]}] was made under other canaries than those that are stored",
                where=str(reports[stale[0]].folder),
                expected=f"canaries {canaries[stale[0]].sha256[:12]}",
                remedy=f"dagster asset materialize --select calibration_report --partition {stale[0]}",
            )
        data = report_data(store, settings, folds, list(verdicts.values()))
        html = render_report(data)
        summary = {
            "folds": folds,
            "canaries": canary_rows(data.canaries),
            "trials": data.trials,
            "heads": data.pooled,
            "simulated": settings.simulated,
            "provenance": provenance(),
        }
        artifact = store.publish(
            "walk_forward_report",
            REPORT_KEY,
            {"report.html": html, "report.json": dump_json(summary)},
            inputs={
                **{f"calibration_report[{k}]": report.sha256 for k, report in reports.items()},
                **{f"canaries[{k}]": artifact.sha256 for k, artifact in canaries.items()},
            },
            settings=settings.of("split", "label"),
        )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.sha256),
            metadata={
                "folds": len(folds),
                "trials": data.trials,
                "report": dg.MetadataValue.path(str(artifact.path("report.html"))),
                "scores": dg.MetadataValue.md(score_table(data.pooled)),
                "fold_strip": dg.MetadataValue.md(f"![folds]({data.fold_strip})"),
                "simulated": settings.simulated,
            },
        )

    @dg.asset_check(
        asset=calibration_report,
        partitions_def=partitions,
        description="Test sessions start at the as-of session and follow the training.",
    )
    def tests_come_after_training(
        context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot
    ) -> dg.AssetCheckResult:
        def fault(key: str) -> str | None:
            split, _ = read_split(artifacts.store, key)
            tests = artifacts.store.load("calibration_report", key).json("calibration.json")["test_sessions"]
            learned = max(split.train + split.validation)
            return f"test {tests[0]}, training up to {learned}" if min(tests) < key or learned >= key else None

        return check_each(context, fault)

    return [calibration_report, walk_forward_report, tests_come_after_training]


def predict_all(store: ArtifactStore, asof: str, sessions: Sequence[str]) -> tuple[pl.DataFrame, dict[str, str]]:
    """Predictions of the stored models of an as-of session on sessions from it on, and the hashes of what was read."""
    from spymaster_assets.models.patchtst import PatchTST  # late, as in patchtst_model

    contract = load_contract()
    patchtst, trees, retrieval = (store.load(a, asof) for a in ("patchtst_model", "tree_bundles", "retrieval_index"))
    require_one_origin(store.load("split_manifest", asof), patchtst, trees, retrieval)
    inputs = {a.asset: a.sha256 for a in (patchtst, trees, retrieval)}
    network, boosted = PatchTST.load(patchtst.contents()), BoostedTrees.load(trees.contents())
    index = RetrievalIndex.load(retrieval.contents(), str(retrieval.folder))
    parts = []
    for key in sessions:
        signals, signal_artifact = read_signals(store, key)
        arrays, sequence_artifact = read_sequences(store, key)
        require_one_origin(signal_artifact, sequence_artifact)
        inputs[f"signals[{key}]"], inputs[f"sequence_dataset[{key}]"] = signal_artifact.sha256, sequence_artifact.sha256
        if not signals.frame.height:
            continue
        frame, delay, stage = signals.frame, index.meta["delay"], index.meta["settings"]["stage"]
        parts.append(
            network.predict(SequenceData.from_arrays(arrays, key)).with_columns(pl.lit("patchtst").alias("model"))
        )
        trees_said = boosted.predict(frame)
        model = (
            pl.when(pl.col("ablation") == "full").then(pl.lit("trees")).otherwise(pl.lit("trees_") + pl.col("ablation"))
        )
        parts.append(trees_said.with_columns(model.alias("model")).drop("ablation"))
        summary, _ = index.query(frame, contract)
        null = index.null_rates(frame)
        for name, table in (("retrieval", summary), ("null_knn", null)):
            for head, column in (
                ("tradeable_2", "p_tradeable_2"),
                ("direction", "p_break_given_tradeable"),
                ("strength", "strength_signed"),
            ):
                if column in table.columns:
                    said = prediction_frame(table["event_id"], head, delay, stage, table[column].to_numpy())
                    parts.append(said.with_columns(pl.col("p").fill_nan(None), pl.lit(name).alias("model")))
    return pl.concat(parts, how="diagonal"), inputs


def report_data(
    store: ArtifactStore, settings: Settings, folds: list[str], canaries: list[dict[str, Any]]
) -> ReportData:
    """Everything that the HTML report shows, from stored artifacts."""
    calendar = calendar_of(settings.symbol)
    reports = [store.load("calibration_report", k) for k in folds]
    outcomes = pl.concat([r.frame("predictions.parquet") for r in reports])
    pooled = judge(outcomes)
    per_fold = [r.json("calibration.json") for r in reports]
    splits = [read_split(store, k)[0].to_json() for k in folds]
    made = set(store.keys("signals"))
    sessions = [k for k in all_sessions(settings) if k in made]
    signals = [read_signals(store, artifact.key)[0] for artifact in store.require("signals", sessions)]
    files = [store.load("market_files", k).json("files.json") for k in sessions]
    example = folds[-1]
    level_set = levels_from_files(store.load("levels", example))
    session = calendar.session(example)
    bars = SessionBars(session, read_bars(store, example)[0]).front(1)
    frame = read_signals(store, example)[0].frame
    curves = [e for e in pooled if e["reliability"] and not e["baseline"]][:_SHOWN_HEADS]
    counts: dict[str, dict[str, int]] = {}
    needed = {f for c in load_contract().columns for f in c.feeds}
    for one in signals:
        for delay, parts in label_counts(one.frame).items():
            for outcome, n in parts.items():
                counts.setdefault(delay, {}).setdefault(outcome, 0)
                counts[delay][outcome] += n
    return ReportData(
        symbol=settings.symbol,
        simulated=settings.simulated,
        label_mode=settings.label.mode,
        schema_version=load_contract().schema_version,
        data_sha256=fingerprint([store.load("signals", k).sha256 for k in sessions]),
        sessions=sessions,
        touches=sum(s.frame.height for s in signals),
        coverage=files,
        missing_feeds=sorted(needed - {f for s in signals for f in s.metadata["feeds"]}),
        base_rates=_sum_base_rates([s.metadata["base_rates"] for s in signals]),
        label_settings=dict(vars(settings.label)),
        split_settings=dict(vars(settings.split)),
        folds=per_fold,
        canaries=canaries,
        pooled=pooled,
        trials=sum(f["trials"] for f in per_fold),
        skipped=[{"asof": f["asof"], **s} for f in per_fold for s in f["skipped"]],
        fold_strip=plots.data_uri(plots.fold_strip(splits, all_sessions(settings), settings.simulated)),
        reliability=plots.data_uri(
            plots.reliability_curves({head_name(e): e["reliability"] for e in curves}, settings.simulated)
        ),
        label_balance=plots.data_uri(plots.label_balance(counts, settings.simulated)),
        example_session=example,
        example_chart=plots.data_uri(
            plots.session_chart(
                bars, frame, level_set.table, session, f"{settings.symbol} {example}", settings.simulated
            )
        ),
    )


def head_name(entry: dict[str, Any]) -> str:
    """Short name of a judged head."""
    return f"{entry['model']} {entry['head']} {entry['delay']} {entry['stage']}"


def score_table(entries: list[dict[str, Any]]) -> str:
    """Markdown table of scored heads."""
    lines = [
        "| model | head | delay | stage | n | base | AUC | skill | 95 % | ECE |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        m, interval = e["metrics"], (e["intervals"] or {}).get("skill")
        cells = [e["model"], e["head"], e["delay"], e["stage"], str(m["n"]), _number(m.get("base_rate")), _number(m.get("auc")),
                 _number(m.get("skill")), f"{interval[0]:.3f}..{interval[1]:.3f}" if interval else "", _number(m.get("ece"))]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _sum_base_rates(rates: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    out: dict[str, dict[str, dict[str, int]]] = {}
    for one in rates:
        for mode, delays in one.items():
            for delay, numbers in delays.items():
                into = out.setdefault(mode, {}).setdefault(delay, dict.fromkeys(numbers, 0))
                for k, v in numbers.items():
                    into[k] += v
    return out
