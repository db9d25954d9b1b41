"""What all tests rest on."""

import signal

# A shell that runs the tests in the background lets them, and all that they start, ignore Ctrl-C; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
