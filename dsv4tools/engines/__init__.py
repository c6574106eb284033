"""Engine profiles: would ds4 or llama.cpp load a planned or existing GGUF, and compute what it says."""

from dsv4tools.engines.header import Header, header_of_file, header_of_plan
from dsv4tools.engines.judge import judge
from dsv4tools.engines.preflight import (
    Engines,
    check_plan,
    choose_engines,
    judge_file,
    judge_plan,
    require_engines,
)
from dsv4tools.engines.profile import Profile, find_profile, list_profiles
from dsv4tools.engines.verdict import EngineFinding, Verdict

__all__ = [
    "EngineFinding", "Engines", "Header", "Profile", "Verdict", "check_plan", "choose_engines", "find_profile",
    "header_of_file", "header_of_plan", "judge", "judge_file", "judge_plan", "list_profiles", "require_engines",
]
