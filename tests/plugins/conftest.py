"""One build of the native code for all of its tests."""

from __future__ import annotations

import pytest

from tests.plugins.native_build import CMakeBuild, Native


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> CMakeBuild:
    # Optimised, but not as far as it goes: compiling would take longer than all tests that run it.
    optimised = "CMAKE_CXX_FLAGS_RELEASE=-O1"
    build = CMakeBuild(tmp_path_factory.mktemp("native"), "SHUNTYARD_BUILD_TESTS=ON", optimised)
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
