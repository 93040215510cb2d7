"""Imported first by the server that workers are forked from: Ctrl-C then ends it without a traceback of its imports.

Once those are done, multiprocessing itself makes the server ignore Ctrl-C, and the parent ends the workers.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
