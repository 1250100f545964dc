"""One run of an experiment, under one name, in MLflow and in Weights & Biases.

Environment: MLFLOW_TRACKING_URI (default SQLite under the data folder), MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE
(offline by default), WANDB_API_KEY or wandb.txt, SPYMASTER_TRACKING (mlflow,wandb | mlflow | wandb | off).
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spymaster_assets.errors import TrackingError

MAX_PARAM = 500
"""MLflow's limit on the length of a parameter; longer values go to an artifact."""
WANDB_KEY_FILE = "wandb.txt"


@dataclass(frozen=True)
class TrackingSettings:
    """Where runs are logged. trackers holds 'mlflow', 'wandb', both or none."""

    root: Path
    trackers: tuple[str, ...]
    mlflow_uri: str
    experiment: str | None
    wandb_project: str
    wandb_entity: str | None
    wandb_mode: str
    wandb_key: str | None = field(repr=False, default=None)

    @classmethod
    def from_env(cls, root: Path, env: Mapping[str, str] | None = None) -> TrackingSettings:
        """Settings from the environment; raise TrackingError on an unknown tracker."""
        env = os.environ if env is None else env
        text = env.get("SPYMASTER_TRACKING") or "mlflow,wandb"
        trackers = () if text.strip().lower() == "off" else tuple(t.strip() for t in text.split(",") if t.strip())
        if unknown := set(trackers) - {"mlflow", "wandb"}:
            raise TrackingError(
                f"unknown tracker {sorted(unknown)[0]!r}", where="SPYMASTER_TRACKING", expected="mlflow, wandb or off"
            )
        key_file = Path(WANDB_KEY_FILE)
        key = env.get("WANDB_API_KEY") or (key_file.read_text().strip() if key_file.is_file() else None)
        return cls(
            root=root,
            trackers=trackers,
            mlflow_uri=env.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}",
            experiment=env.get("MLFLOW_EXPERIMENT_NAME") or None,
            wandb_project=env.get("WANDB_PROJECT") or "spymaster",
            wandb_entity=env.get("WANDB_ENTITY") or None,
            wandb_mode=(env.get("WANDB_MODE") or "offline").lower(),
            wandb_key=key,
        )

    def check(self) -> None:
        """Raise TrackingError, before any work, when W&B is online without a key or in an unknown mode."""
        if "wandb" not in self.trackers:
            return
        if self.wandb_mode not in ("online", "offline", "disabled"):
            raise TrackingError(f"WANDB_MODE={self.wandb_mode!r} is unknown", expected="online, offline or disabled")
        if self.wandb_mode == "online" and not self.wandb_key:
            raise TrackingError(
                "Weights & Biases is online but has no key",
                where="WANDB_MODE=online",
                expected=f"WANDB_API_KEY, or a file {WANDB_KEY_FILE} in the working folder",
                remedy="set the key, or WANDB_MODE=offline, or SPYMASTER_TRACKING=mlflow",
            )


def run_name(kind: str, schema_version: str, first: str, last: str, suffix: int | str) -> str:
    """`<kind>-v<schema>-<first>_<last>-<suffix>`: the name that both trackers show."""
    return f"{kind}-v{schema_version}-{first}_{last}-{suffix}"


class Run:
    """An open run; everything logged goes to every tracker, and a tracker that fails raises TrackingError."""

    def __init__(self, name: str, mlflow_run: Any, client: Any, wandb_run: Any, bundle: Any, folder: Path) -> None:
        self.name = name
        self._mlflow, self._client, self._wandb, self._bundle, self._folder = (
            mlflow_run,
            client,
            wandb_run,
            bundle,
            folder,
        )
        self.ids: dict[str, str] = {}
        if mlflow_run is not None:
            self.ids["mlflow_run_id"] = mlflow_run.info.run_id
        if wandb_run is not None:
            self.ids["wandb_run_id"] = wandb_run.id

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers by name, nested ones by dotted names; values that are not finite numbers are left out."""
        finite = {
            k: float(v)
            for k, v in _leaves(metrics).items()
            if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
        }
        if not finite:
            return
        with _typed("metrics"):
            if self._mlflow is not None:
                from mlflow.entities import Metric
                from mlflow.utils.time import get_current_time_millis

                now = get_current_time_millis()
                entries = [Metric(_mlflow_name(k), v, now, step or 0) for k, v in finite.items()]
                for start in range(0, len(entries), 1000):
                    self._client.log_batch(self._mlflow.info.run_id, metrics=entries[start : start + 1000])
            if self._wandb is not None:
                self._wandb.log(finite if step is None else {**finite, "epoch": step})

    def log_artifact(self, data: bytes, name: str) -> None:
        """A file of the run."""
        path = self._folder / name
        path.write_bytes(data)
        with _typed(f"artifact {name}"):
            if self._mlflow is not None:
                self._client.log_artifact(self._mlflow.info.run_id, str(path))
            if self._bundle is not None:
                self._bundle.add_file(str(path), name=name)

    def close(self, *, failed: bool) -> None:
        """End the run in every tracker; files go to W&B as one artifact of a finished run."""
        with _typed("the end of the run"):
            if self._wandb is not None:
                if not failed:
                    self._wandb.log_artifact(self._bundle)
                self._wandb.finish(exit_code=1 if failed else 0)
            if self._mlflow is not None:
                self._client.set_terminated(self._mlflow.info.run_id, status="FAILED" if failed else "FINISHED")


@contextmanager
def track(
    settings: TrackingSettings, *, experiment: str, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Iterator[Run]:
    """Open a run in every tracker; it ends as finished, or as failed when the body raises.

    params are flattened; one that is too long is kept in the artifact params_long.json. MLFLOW_EXPERIMENT_NAME overrides `experiment`.
    """
    settings.check()
    settings.root.mkdir(parents=True, exist_ok=True)
    flat = flatten(params)
    with tempfile.TemporaryDirectory(prefix="spymaster-run-") as folder:
        client, mlflow_run = (
            _open_mlflow(settings, experiment, run_name, tags) if "mlflow" in settings.trackers else (None, None)
        )
        wandb_run = bundle = None
        if "wandb" in settings.trackers and settings.wandb_mode != "disabled":
            wandb_run, bundle = _open_wandb(settings, experiment, run_name, flat, tags)
        run = Run(run_name, mlflow_run, client, wandb_run, bundle, Path(folder))
        try:
            if mlflow_run is not None:
                _log_params(client, mlflow_run.info.run_id, flat, run)
            yield run
        except BaseException:
            run.close(failed=True)
            raise
        run.close(failed=False)


def flatten(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested values as dotted names and text: dictionaries are opened, lists become comma text."""
    return {k: ",".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for k, v in _leaves(values).items()}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        out |= _leaves(value, name) if isinstance(value, Mapping) else {name: value}
    return out


def _open_mlflow(settings: TrackingSettings, experiment: str, name: str, tags: Mapping[str, str]) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):  # after the import, which sets its own levels
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with _typed(f"MLflow at {settings.mlflow_uri}"):
        client = MlflowClient(tracking_uri=settings.mlflow_uri)
        title = settings.experiment or experiment
        known = client.get_experiment_by_name(title)
        local = settings.mlflow_uri.startswith("sqlite")
        where = (settings.root / "mlartifacts").resolve().as_uri() if local else None
        experiment_id = known.experiment_id if known else client.create_experiment(title, artifact_location=where)
        return client, client.create_run(experiment_id, run_name=name, tags=dict(tags))


def _log_params(client: Any, run_id: str, flat: Mapping[str, str], run: Run) -> None:
    from mlflow.entities import Param

    short = {k: v for k, v in flat.items() if len(v) <= MAX_PARAM}
    with _typed("parameters"):
        client.log_batch(run_id, params=[Param(k, v) for k, v in short.items()])
    if len(short) < len(flat):
        run.log_artifact(
            json.dumps({k: v for k, v in flat.items() if k not in short}, indent=1).encode(), "params_long.json"
        )


def _open_wandb(
    settings: TrackingSettings, experiment: str, name: str, flat: Mapping[str, str], tags: Mapping[str, str]
) -> tuple[Any, Any]:
    import wandb

    with _typed("W&B"):
        if settings.wandb_mode == "online":
            wandb.login(key=settings.wandb_key, verify=False)
        run = wandb.init(
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            name=name,
            group=experiment,
            config={**flat, **tags},
            mode=settings.wandb_mode,  # type: ignore[arg-type]
            dir=str(settings.root),
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )
        return run, wandb.Artifact(name=experiment, type="model", metadata={"run_name": name, **tags})


def _mlflow_name(name: str) -> str:
    """MLflow allows letters, digits and `_-./ :` in names."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)


@contextmanager
def _typed(what: str) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:  # trackers raise many kinds
        raise TrackingError(
            f"{what} could not be logged: {type(error).__name__}: {error}",
            remedy="mend the tracker's settings, or turn it off with SPYMASTER_TRACKING",
        ) from error
