"""Speaks steersman's reward protocol for one function of a Python file: python3 -c SHIM FILE [FUNCTION].

A line of JSON on stdin is a call: {"prompts": [...], "completions": [...], "completion_ids": [...],
columns...}; a line on stdout answers it: {"rewards": [...]} or {"error": "..."}. The first line is
{"ready": name}. What the function prints goes to stderr.
"""
import asyncio
import importlib.util
import inspect
import json
import math
import os
import sys
import traceback

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
sys.stdout = sys.stderr


class Refused(Exception):
    """What is wrong with a reward, in words of its own."""


def say(message):
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def chosen(module, path, name):
    own = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    public = {key: value for key, value in own.items() if not key.startswith("_")}
    if name:
        if name not in own:
            raise Refused(f"{path} has no function {name}; it has {', '.join(public) or 'none'}")
        return own[name]
    named = {key: value for key, value in public.items() if "reward" in key}
    for some in (public, named):
        if len(some) == 1:
            return next(iter(some.values()))
    if not public:
        raise Refused(f"{path} has no function")
    raise Refused(f"{path} has several functions ({', '.join(public)}): name one as {path}:function")


def number(value):
    """A reward as JSON: a number, None, or a text that says what else it is."""
    if value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError):
        return f"it gave {value!r}, which is no number"
    return value if math.isfinite(value) else f"it gave {value}"


def arguments(function, request):
    """What the function asks for of the call; without **kwargs it gets nothing else."""
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    plain = {p.name: p for p in parameters if p.kind not in variadic}
    wanted = [name for name, p in plain.items() if p.default is p.empty and name not in request]
    if wanted:
        names, there = ", ".join(wanted), ", ".join(request)
        raise Refused(f"{function.__name__} wants {names}, which the rows do not have; it can get {there}")
    if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters):
        return request
    return {key: value for key, value in request.items() if key in plain}


def call(function, request):
    request = arguments(function, request)
    rewards = function(**request)
    if inspect.isawaitable(rewards):

        async def result():
            return await rewards

        rewards = asyncio.run(result())
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not isinstance(rewards, (list, tuple)):
        wanted = "a list of one number a completion"
        raise Refused(f"{function.__name__} returned {rewards!r:.80} and not {wanted}")
    return {"rewards": [number(value) for value in rewards]}


def reason(error, path):
    """One line: where in the user's file, and what."""
    if isinstance(error, Refused):
        return str(error)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    place = f"{os.path.basename(path)} line {lines[-1]}: " if lines else ""
    what = traceback.format_exception_only(type(error), error)[-1].strip()
    return place + what


def main():
    path, name = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    try:
        sys.path.insert(0, os.path.dirname(path))
        spec = importlib.util.spec_from_file_location("steersman_reward", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        function = chosen(module, path, name)
    except Exception as error:
        traceback.print_exc()
        say({"error": reason(error, path)})
        return
    say({"ready": function.__name__})
    for line in sys.stdin:
        try:
            answer = call(function, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": reason(error, path)}
        say(answer)


main()
