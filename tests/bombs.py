"A pickle that does something when it is read: whatever must not unpickle is tried with it."

import os


class Bomb:
    "Makes a folder when it is unpickled."

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)
