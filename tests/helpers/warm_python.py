"""
Runs programs as ``python -m MODULE ...`` and ``python -c SCRIPT ...`` do, each in a fork of this process, which has imported
what takes seconds to import. A program is a line of standard input: a JSON list of the files for what it writes to stdout and
stderr, and of its arguments. When it has ended, its exit status is a line of standard output.
"""

import gc
import json
import os
import runpy
import signal
import sys
import types

# Only to be there
import huggingface_sb3  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import numpy as np
import optuna.visualization.matplotlib  # noqa: F401
import pandas  # noqa: F401
import sb3_contrib  # noqa: F401
import torch._dynamo  # noqa: F401  by PyTorch when the first optimizer is made


def fork_for_each_program() -> list[str]:
    """:return: in each fork, the arguments of its program"""
    for line in sys.stdin:
        stdout, stderr, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate((os.devnull, stdout, stderr)):
                opened = os.open(file, os.O_RDWR | os.O_CREAT)
                os.dup2(opened, number)
                os.close(opened)
            return arguments
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    # Nothing of what was imported needs to be told
    os._exit(0)


# What is here stays: else the end of each fork takes more than a second
gc.freeze()
option, program, *rest = fork_for_each_program()
# It must not hang for ever
signal.alarm(300)
# A new process would begin with other random numbers
np.random.seed()  # noqa: NPY002
sys.argv = [option, *rest]
if option == "-m":
    sys.path[0] = os.getcwd()
    runpy.run_module(program, run_name="__main__", alter_sys=True)
else:
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), vars(module))
