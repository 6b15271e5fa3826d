"""An agent without any library, and the odd ways in which one can behave.

Run as `python odd_agents.py WHAT MARK`, as a command of `environment.command`: base URL and key are
in its environment, its task is on standard input. By MARK, if it is given, a test knows what has
been left behind.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any


def ask(*said: str, key: str | None = None) -> str:
    """The policy's reply to a conversation in which the user speaks first."""
    url, key = os.environ["OPENAI_BASE_URL"], key or os.environ["OPENAI_API_KEY"]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    body = json.dumps({"model": "any", "messages": messages}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        read: dict[str, Any] = json.load(answer)
    return str(read["choices"][0]["message"]["content"])


def reaches(family: int, address: Any) -> bool:
    """Whether a connection to `address` can be made."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.settimeout(2)
            one.connect(address)
    except OSError:
        return False
    return True


def main(what: str, task: dict[str, Any]) -> None:
    question = str(task["prompt"])
    first = "" if what == "says nothing" else ask(question)
    match what:
        case "answers":
            second = ask(question, first, "Sure?")
            print("thinking aloud")
            print(json.dumps({"reward": 1.0 if second == task["answer"] else 0.25}))
        case "plays":  # its reward and its forks follow from what the policy says
            if len(first) % 2:
                ask("A sub-task: " + question)
            second = ask(question, first, "Sure?")
            print(json.dumps({"reward": sum(map(ord, first + second)) % 5 / 4}))
        case "leaves it to the rules":
            print("no reward here")
        case "forks":
            ask("A sub-task: " + question)
            ask(question, first, "Sure?")
            ask("A summary of it all.")
            print('{"reward": 1}')
        case "hangs":
            time.sleep(600)
        case "raises":
            raise RuntimeError("the agent lost its way")
        case "exits":
            os._exit(3)
        case "kills itself":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kills its keeper":
            os.kill(os.getppid(), signal.SIGKILL)
            print('{"reward": 1}')
        case "gives NaN":
            print('{"reward": NaN}')
        case "gives words":
            print('{"reward": "much"}')
        case "prints a gigabyte":
            for _ in range(1024):
                sys.stdout.write("x" * 2**20)
            print('\n{"reward": 1}')
        case "prints a gigabyte of errors":
            for _ in range(1024):
                sys.stderr.write("x" * 2**20)
            sys.stderr.write("\nat last")
            sys.exit(1)
        case "leaves a child":
            escape = "import os, time; os.setsid(); time.sleep(600)"
            subprocess.Popen([sys.executable, "-c", escape, *sys.argv[2:]])
            print('{"reward": 1}')
        case "forks on":
            while True:
                try:
                    if os.fork() == 0:
                        time.sleep(600)
                except OSError:
                    time.sleep(1)
        case "takes memory":
            held = bytearray(2 * 2**30)
            held[:: 2**12] = b"x" * len(held[:: 2**12])
            time.sleep(600)
        case "looks around":
            port, path = int(task["port"]), str(task["path"])
            found = {
                "outside": reaches(socket.AF_INET, ("127.0.0.1", port)),
                "far": reaches(socket.AF_INET, ("192.0.2.1", 80)),
                "files": reaches(socket.AF_UNIX, path),
                "abstract": reaches(socket.AF_UNIX, "\0" + path),
                "secret": readable(str(task["secret"])),
                "key": any("SECRET" in name for name in os.environ),
            }
            print(json.dumps(found))
            print(json.dumps({"reward": float(not any(found.values()))}))
        case "uses another key":
            try:
                ask("Whose?", key=os.environ["OPENAI_API_KEY"][:-1])
            except urllib.error.HTTPError as error:
                print(json.dumps({"reward": float(error.code == 401)}))
        case "asks twice at once":
            command = [sys.executable, __file__, "answers once", *sys.argv[2:]]
            both = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
            for one in both:
                assert one.stdin is not None
                one.stdin.write(json.dumps(task).encode() + b"\n")
                one.stdin.close()
            print(json.dumps({"reward": sum(one.wait(60) == 0 for one in both)}))
        case "goes on and on":
            said = [question, first]
            while True:
                said += ["More.", ask(*said, "More.")]


def readable(path: str) -> bool:
    try:
        with open(path) as file:
            return bool(file.read())
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.stdin.readline()))
