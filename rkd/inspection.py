"""What is this file or folder? Nothing in it is run (torch only for checkpoints)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rkd.bench import result as bench_result
from rkd.bundle import read_bundle
from rkd.errors import RkdError, StorageError, TriggerError
from rkd.files import file_sha256, read_bytes, sha256
from rkd.metrics import Scores
from rkd.run import STUDENT, SUMMARY, Run
from rkd.target import load_target
from rkd.toml import read_toml
from rkd.triggers import Trigger


def inspect_path(path: Path) -> dict[str, Any]:
    """A nested description, its `kind` first.

    Raises:
        StorageError: no such file.
        RkdError: it is none of the things that rkd knows, or damaged.
    """
    if not path.exists():
        raise StorageError(f"no such file or folder: {path}")
    if path.is_dir():
        return _run(path)
    by_ending = {".rkd": _bundle, ".npz": _trigger, ".toml": _toml, ".json": _result}
    return by_ending.get(path.suffix.lower(), _checkpoint)(path)


def describe_scores(scores: Scores) -> dict[str, str]:
    """Percent, interval and n of each figure, as text."""
    figures = {"ACC": scores.acc}
    for t in scores.triggers:
        figures |= {f"ASR {t.trigger} (to class {t.target})": t.asr, f"RA {t.trigger}": t.ra}
    return {name: f"{p} % [{p.interval[0]:.1f}, {p.interval[1]:.1f}], n = {p.n}" for name, p in figures.items()}


def _run(path: Path) -> dict[str, Any]:
    if not (path / SUMMARY).is_file():
        raise RkdError(f"{path} is a folder without a {SUMMARY}: not a run of rkd (a data folder is given with --data)")
    run = Run.open(path)
    summary = run.summary
    found: dict[str, Any] = {
        "kind": f"run ({summary.get('kind')})",
        "state": summary["state"],
        "created": summary.get("created"),
    }
    found["command"] = " ".join(map(str, summary.get("command", [])))
    found["settings"] = {
        name: f"{setting['value']!r}  ({setting['origin']})" for name, setting in summary["settings"].items()
    }
    for part in ("data", "teacher", "detox", "fooling", "student", "timings", "versions"):
        if isinstance(summary.get(part), dict):
            found[part] = {key: value for key, value in summary[part].items() if key != "history"}
    recorded = summary.get("student", {}).get("sha256")
    if recorded and (path / STUDENT).is_file():
        same = file_sha256(path / STUDENT) == recorded
        found["student"]["file"] = "matches its digest" if same else "DOES NOT MATCH its digest"
    for row in summary.get("models", []):
        found[row["role"]] = describe_scores(Scores.from_json(row["scores"]))
    checkpoint = run.latest_step()
    if not run.finished:
        found["checkpoint"] = (
            f"step {checkpoint}"
            if checkpoint is not None
            else "none yet of this student; what was finished before it is kept"
        )
        found["go on with"] = f"rkd {summary.get('kind')} --resume {path}"
    return found


def _bundle(path: Path) -> dict[str, Any]:
    bundle = read_bundle(path)
    images, labels = bundle.evaluation()
    ledger = bundle.ledger()
    manifest = bundle.manifest
    student, exported = (describe_scores(Scores.from_json(manifest["scores"][key])) for key in ("student", "exported"))
    return {
        "kind": "bundle, every digest verified",
        "name": bundle.name,
        "role": bundle.role,
        "sha256": bundle.digest,
        "target": bundle.target.to_json(),
        "input": f"uint8 {manifest['input']['shape']}, opset {manifest['opset']}, {manifest['precision']}",
        "classes": f"{len(bundle.classes)}: {', '.join(bundle.classes[:10])}{', ...' if len(bundle.classes) > 10 else ''}",
        "evaluation": f"{len(labels)} images of {images.shape[2]}x{images.shape[3]} pixels",
        "triggers": [f"{t.name} to class {t.target}" for t in bundle.triggers()],
        "ledger": [step.name for step in ledger.steps] if ledger else [],
        "members": {
            name: f"{entry['size_bytes']:,} bytes, sha256 {entry['sha256']}"
            for name, entry in manifest["members"].items()
        },
        "chain": dict(manifest["chain"]),
        f"{bundle.role} before export": student,
        "exported file on the host": exported,
        "made with": dict(manifest["tool"]),
    }


def _trigger(path: Path) -> dict[str, Any]:
    try:
        trigger = Trigger.load(path)
    except TriggerError as error:
        hint = " (a data .npz is given with --data)" if "is not a trigger" in str(error) else ""
        raise TriggerError(f"{error}{hint}") from error
    height, width = trigger.size
    return {
        "kind": "trigger",
        "name": trigger.name,
        "target class": trigger.target,
        "size": f"{height}x{width}",
        "masked pixels": f"{100 * float((trigger.mask.max(0) > 0).mean()):.1f} %",
        "additive change": f"at most {255 * float(abs(trigger.additive).max()):.1f} / 255"
        if trigger.additive.any()
        else "none",
        "moves pixels": "yes, it warps" if trigger.grid is not None else "no",
        "sha256": sha256(read_bytes(path)),
    }


def _toml(path: Path) -> dict[str, Any]:
    content = read_toml(path)
    if path.name == "rkd.toml":
        return {"kind": "defaults of rkd's commands in this folder; the command line wins", **content}
    if "attacks" in content or "defences" in content:
        return {"kind": f"suite; its cells: rkd suite {path} --dry-run", "about": content.get("about", "")}
    return {"kind": "target profile", **load_target(str(path)).to_json()}


def _result(path: Path) -> dict[str, Any]:
    result = bench_result.read(path)
    found: dict[str, Any] = {"kind": "result of rkd bench", "interrupted": result["interrupted"]}
    for number, entry in enumerate(result["entries"], 1):
        latency, scores, validity = entry["latency"], entry["scores"], entry["validity"]
        reasons = "; ".join(f"{reason['code']}: {reason['text']}" for reason in validity["reasons"])
        found[f"{number}: {entry['bundle']['name']}"] = {
            "started": entry["started"],
            "p50": f"{latency['p50']['ms']:.3g} ms" if latency else "not measured",
            **(describe_scores(Scores.from_json(scores)) if scores else {}),
            "valid": "yes" if validity["valid"] else f"NO: {reasons}",
        }
    return found


def _checkpoint(path: Path) -> dict[str, Any]:
    from rkd.models.infer import infer_arch, output_count
    from rkd.teacher import read_checkpoint

    checkpoint = read_checkpoint(path)
    shapes = checkpoint.shapes
    header = checkpoint.header or {}
    archs = (str(header["arch"]),) if "arch" in header else infer_arch(shapes, (32, 32))
    numbers = sum(t.numel() for name, t in checkpoint.tensors.items() if name in shapes)
    return {
        "kind": "checkpoint, read without running it",
        "sha256": checkpoint.sha256,
        "written by": "rkd" if checkpoint.header is not None else "somebody else",
        "network": " or ".join(archs) if archs else "unknown: name it with --arch",
        "outputs": output_count(shapes),
        "numbers": f"{numbers:,} in {len(shapes)} tensors (parameters and BatchNorm's statistics), all finite",
        "input scaling": f"mean {header['mean']}, std {header['std']}" if "mean" in header and "std" in header
        else "not in the file: give --normalize",
        "provenance": header.get("provenance", {}),
        "notes": list(checkpoint.notes),
    }  # fmt: skip
