"""Makes the peers' environments under a directory: each is the running one, overlaid with what the peer pins.

``python bench/peers/environments.py DIR [NAME ...]``; packages come without their dependencies, since torch is here.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.peers import PEERS


def make(directory: Path, packages: tuple[str, ...]) -> None:
    """One environment; packages of the running one are found behind its own."""
    venv.create(directory, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = directory / "lib" / version / "site-packages" / "base.pth"
    own.write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", *packages], check=True)


def main() -> None:
    """The command line."""
    if len(sys.argv) < 2:
        sys.exit("which directory?")
    directory, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    for peer in PEERS:
        if peer.packages and (not names or peer.environment in names):
            print(f"{peer.environment}: {' '.join(peer.packages)}")
            make(directory / peer.environment, peer.packages)


if __name__ == "__main__":
    main()
