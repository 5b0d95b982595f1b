"""Tests of compiling, caching and loading the native library. A script replaces the compiler, which takes seconds."""

import subprocess
import sys
import types

import pytest

from fcvit.errors import MissingExtra
from fcvit.native import build


@pytest.fixture(scope="module")
def compiled_library():
    """The path of the real library, which the tests copy."""
    try:
        return build.library()._name
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Use a shell script as the compiler, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    monkeypatch.delenv(build.EXTRA_FLAGS, raising=False)

    def write(lines):
        (tmp_path / "compiler").write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "compiler").chmod(0o755)
        return tmp_path

    return write


@pytest.fixture
def copying_compiler(compiled_library, script, tmp_path):
    return script(
        f"""echo "$*" >> {tmp_path}/log
[ -z "$SLOW_COMPILER" ] || sleep 0.2
while [ "$1" != -o ]; do shift; done
cp {compiled_library} "$2" """
    )


def commands(folder):
    return (folder / "log").read_text().splitlines()


def load(level=None):
    """Load the library anew, as in a new process."""
    return build.library.__wrapped__(level)


def test_the_library_is_compiled_once_one_source_per_process(copying_compiler, notes):
    assert not build.is_built()
    for _ in range(2):
        assert load().fcvit_linear_float32 and build.is_built()
    *sources, link = commands(copying_compiler)
    names = sorted(word.rpartition("/")[2] for line in sources for word in line.split() if word.endswith(".cc"))
    assert names == sorted(path.name for path in build._sources("*.cc")) and "operators.cc" in names
    assert link.count(".o ") == len(names) and all("-O3" in line for line in sources)
    assert {path.suffix for path in copying_compiler.glob("cache/fcvit/native/*/*")} == {".so", ""}
    (note,) = notes
    assert build.levels()[0] in note and str(copying_compiler / "cache" / "fcvit" / "native") in note


def test_every_level_has_its_own_library(copying_compiler):
    for level in ("x86-64-v3", "x86-64-v4", "native"):
        assert not build.is_built(level)
        load(level)
        assert build.is_built(level) and f"-march={level}" in commands(copying_compiler)[-1]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("", ("x86-64-v4", "x86-64-v3")),
        ("avx512vl", ("x86-64-v3",)),
        ("fma", ("native",)),
        ("everything", ("native",)),
    ],
)
def test_the_level_is_chosen_by_the_instruction_sets_of_the_processor(missing, expected, monkeypatch):
    flags = frozenset() if missing == "everything" else (build._AVX2 | build._AVX512 | {"sse2"}) - {missing}
    monkeypatch.setattr(build, "processor_flags", lambda: flags)
    assert build.levels() == expected


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: data[:-9] + b"corrupted", lambda data: b""])
def test_a_damaged_library_is_compiled_again(copying_compiler, damage):
    load()
    (cached,) = copying_compiler.glob("cache/fcvit/native/*/*.so")
    data = cached.read_bytes()
    cached.unlink()  # the loaded file must not change
    cached.write_bytes(damage(data))
    assert not build.is_built()
    assert load().fcvit_linear_float32
    assert sum("-shared" in line for line in commands(copying_compiler)) == 2
    assert cached.read_bytes() == data


@pytest.mark.slow
def test_concurrent_processes_compile_once(copying_compiler, monkeypatch):
    monkeypatch.setenv("SLOW_COMPILER", "1")
    code = "from fcvit.native import build; build.library()"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert sum("-shared" in line for line in commands(copying_compiler)) == 1


def test_the_library_is_built_again_if_a_dependency_changes(copying_compiler, monkeypatch, tmp_path):
    load()
    assert build.is_built()
    monkeypatch.setenv(build.EXTRA_FLAGS, "-g")
    assert not build.is_built()
    monkeypatch.delenv(build.EXTRA_FLAGS)
    (tmp_path / "compiler").touch()
    assert not build.is_built()
    load()
    assert build.is_built()
    (tmp_path / "changed.cc").write_text("// changed")
    monkeypatch.setattr(build, "_sources", lambda pattern: sorted(tmp_path.glob(pattern)))
    assert not build.is_built()


def test_the_processor_is_part_of_the_key_only_for_native_code(copying_compiler, monkeypatch):
    for level in ("native", "x86-64-v3"):
        load(level)
    monkeypatch.setattr(build, "processor_identity", lambda: "another processor")
    assert (build.is_built("native"), build.is_built("x86-64-v3")) == (False, True)


def test_a_built_library_is_loaded_from_a_cache_that_cannot_be_written(copying_compiler):
    load()
    (folder,) = copying_compiler.glob("cache/fcvit/native/*")
    (folder / "lock").unlink()
    (folder / "lock").mkdir()  # cannot be opened, even by root
    assert load().fcvit_linear_float32


def failure():
    with pytest.raises(MissingExtra) as caught:
        load()
    assert "\n" not in str(caught.value) and not build.is_built()
    return str(caught.value)


def test_a_missing_compiler_is_reported(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler found (g++, clang++, c++); install" in failure()


def test_a_compiler_error_is_reported(script, notes):
    folder = script("echo 'In file x:' >&2\necho 'fatal error: omp.h: not found' >&2\nexit 1")
    assert failure().endswith("compiler failed: fatal error: omp.h: not found; " + build.REMEDY)
    assert [path.name for path in folder.glob("cache/fcvit/native/*/*")] == ["lock"]


def test_a_file_that_is_no_compiler_is_reported(script, tmp_path):
    script("")
    (tmp_path / "compiler").write_bytes(b"\x7fELF")
    assert "compiler cannot be started: Exec format error" in failure()


def test_a_failing_source_ends_the_other_compilations(script, tmp_path, monkeypatch):
    """The first source fails at once, and the others would take a minute."""
    monkeypatch.setattr(build, "available_threads", lambda: 8)
    first = build._sources("*.cc")[0].name
    script(f'case "$*" in *{first}*) echo "error: it broke" >&2; exit 1 ;; esac\nexec sleep 60')
    assert "error: it broke" in failure()


def test_a_cache_that_cannot_be_written_is_reported(copying_compiler, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(copying_compiler / "compiler"))  # not a folder
    assert "XDG_CACHE_HOME" in failure()


def test_no_library_on_windows(monkeypatch):
    monkeypatch.setattr(build, "os", types.SimpleNamespace(name="nt", environ={}))
    assert "only Linux and macOS" in failure()
