"""One build of the native code for all of its tests."""

from __future__ import annotations

import fcntl
import os

import pytest

from tests.plugins.native_build import CMakeBuild, Native


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> CMakeBuild:
    # Optimised, but not as far as it goes: compiling would take longer than all tests that run it.
    optimised = "CMAKE_CXX_FLAGS_RELEASE=-O1"
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers: the first one builds, the others find it built
    with (base / "native.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = CMakeBuild(base / "native", "SHUNTYARD_BUILD_TESTS=ON", optimised)
        assert build.status == 0, build.configured
        status, text = build.build()
        assert status == 0, text
    return build


@pytest.fixture(scope="session")
def on_host(built: CMakeBuild) -> Native:
    return Native(built.directory / "plugins/native/tests/libshuntyard_on_host.so")


@pytest.fixture(scope="session")
def without_kernels(built: CMakeBuild) -> Native:
    return Native(built.directory / "plugins/native/libshuntyard_plugins.so")
