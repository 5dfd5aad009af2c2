"""A device whose copies are made as late as their order allows, for tests."""

from __future__ import annotations

from python_backends.runtime.gpu.interpreter import InterpreterDevice


class Late:
    """A copy that is made when somebody waits for it."""

    def __init__(self, run, after):
        self._run, self._after, self._over = run, tuple(after), False

    def done(self):
        return self._over

    def wait(self):
        if not self._over:
            self._over = True
            for other in self._after:
                other.wait()
            self._run()


class LateDevice(InterpreterDevice):
    """Makes copies as late as their order allows."""

    def copy_out(self, copies, after=()):
        return Late(lambda: InterpreterDevice.copy_out(self, copies), after)

    def copy_in(self, copies, after=()):
        return Late(lambda: InterpreterDevice.copy_in(self, copies), after)
