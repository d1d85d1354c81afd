"""
Runs programs as a new Python does, each in a fork of this process, which has imported what takes seconds to import, but
neither the zoo nor the package. warm_python_client.py asks for them, through the socket whose file descriptor is the argument.
"""

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import site
import socket
import sys
import sysconfig
import threading
import traceback
import types

MODULES = (
    *("torch._dynamo", "stable_baselines3", "numpy", "pandas", "matplotlib.pyplot"),
    # What the zoo imports
    *("huggingface_sb3", "networkx", "optuna.visualization.matplotlib", "pygame", "sb3_contrib", "seaborn"),
)


def fork_for_each_program(listener: socket.socket) -> list[str]:
    """:return: in each fork, the arguments of its program"""
    signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))
    # Until the tests, which hold the other end of standard input, have ended
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return fork_of_its_own(connection)
        connection.close()
    os._exit(0)


def fork_of_its_own(connection: socket.socket) -> list[str]:
    """
    Tell the client how the program ends, and the program the client's signals.

    :return: in the fork, the arguments of the program
    """
    request, files, *_ = socket.recv_fds(connection, 65536, 3)
    while not request.endswith(b"\n"):
        request += connection.recv(65536)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        folder, variables, *arguments = json.loads(request)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        return arguments

    def pass_signals_on() -> None:
        while number := connection.recv(1):
            os.kill(pid, number[0])
        # The client has been killed, or has ended as the program has
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=pass_signals_on, daemon=True).start()
    connection.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def start_as_python_does(first_on_path: str) -> None:
    """What depends on environment variables when Python and the modules start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A new process would begin with other random numbers
    sys.modules["numpy"].random.seed()
    sys.modules["matplotlib"].rcParams["backend"] = os.environ["MPLBACKEND"]
    sys.path[0:1] = [first_on_path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # The process of which this is a fork has been started with the hook off
    del sys.modules["sb3_vpg_zoo_hook"]
    site.addpackage(sysconfig.get_path("purelib"), "sb3_vpg_zoo_hook.pth", None)
    if importlib.util.find_spec("sitecustomize"):
        importlib.import_module("sitecustomize")


def run(option: str, *arguments: str) -> None:
    """:param option: "-m", "-c" or a file"""
    if option == "-u":
        run(*arguments)
    elif option == "-m":
        start_as_python_does(os.getcwd())
        sys.argv = [option, *arguments[1:]]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        start_as_python_does("")
        sys.argv = [option, *arguments[1:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), vars(module))
    else:
        start_as_python_does(os.path.dirname(os.path.abspath(option)))
        sys.argv = [option, *arguments]
        runpy.run_path(option, run_name="__main__")


for name in MODULES:
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
# What is here stays
gc.freeze()
arguments_of_program = fork_for_each_program(socket.socket(fileno=int(sys.argv[1])))
status: object = 0
try:
    run(*arguments_of_program)
except SystemExit as end:
    status = end.code
except BaseException:
    traceback.print_exc()
    status = 1
if not isinstance(status, int | None):
    print(status, file=sys.stderr)
    status = 1
# The end of a Python, without the half second in which it would delete what has been imported
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status or 0)
