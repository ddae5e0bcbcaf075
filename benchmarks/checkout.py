"""Working copies of the project, of which each runs its own code in processes of its own."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A working copy; whatever it runs imports its own package and its own benchmarks."""

    root: Path

    def environment(self, devices: int = 1) -> dict[str, str]:
        """Environment of its programs, which see so many devices that JAX simulates."""
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(self.root),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """Starts Python from the root; its output can be read, line by line."""
        return subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=self.root,
            stdout=subprocess.PIPE,
            text=True,
            **{"env": self.environment(), **options},
        )

    def run(self, *arguments: str, devices: int = 1) -> str:
        """Runs Python from the root; returns its output, or ends with it if it failed."""
        ran = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.environment(devices),
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            sys.exit(f"{self.root}: {' '.join(arguments)} failed:\n{ran.stdout}{ran.stderr}")
        return ran.stdout
