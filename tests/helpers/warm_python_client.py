"""
A program that is called as Python is: it lets a fork of the process of warm_python.py, beside whose socket it lies, do what it
is told, with its own files, folder, environment variables and signals, and ends as that does.
"""

import json
import os
import signal
import socket
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.path.join(os.path.dirname(__file__), "socket"))
    for number in SIGNALS:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    request = json.dumps([os.getcwd(), dict(os.environ), *sys.argv[1:]]).encode() + b"\n"
    sent = socket.send_fds(connection, [request], [0, 1, 2])
    connection.sendall(request[sent:])
    status = int(connection.recv(16))
if status < 0:
    # Killed by a signal
    if -status in SIGNALS:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
