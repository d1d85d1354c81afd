"""
Makes ``--algo vpg`` known to RL Baselines3 Zoo, which has no plugin hook of its own.

This file is installed at the top level of site-packages as ``sb3_vpg_zoo_hook`` and imported at interpreter start by the line
in ``sb3_vpg_zoo_hook.pth``. It imports nothing but ``os`` and ``sys``. When, and only when, one of rl_zoo3's modules named
below has been imported, it calls :func:`sb3_vpg.zoo.patch` on it.

Set the environment variable ``SB3_VPG_NO_ZOO_HOOK`` to anything but an empty string to switch it off.
"""

import os
import sys

MODULES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")


class ZooFinder:
    """A finder on ``sys.meta_path`` that lets the others find rl_zoo3's modules and sees to it that VPG is added to them."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in MODULES:
            return None
        # Only those behind this one: two of its kind would ask each other for ever
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    cls.patch_after(spec.loader)
                return spec
        return None

    @staticmethod
    def patch_after(loader):  # type: ignore[no-untyped-def]
        exec_module = loader.exec_module

        def exec_and_patch(module):  # type: ignore[no-untyped-def]
            exec_module(module)
            try:
                from sb3_vpg.zoo import patch

                patch(module)
            except Exception as error:  # the zoo's own algorithms must go on working
                import warnings

                warnings.warn(f"sb3_vpg could not add VPG to {module.__name__}: {error!r}", stacklevel=2)

        loader.exec_module = exec_and_patch


if not os.environ.get("SB3_VPG_NO_ZOO_HOOK"):
    sys.meta_path.insert(0, ZooFinder)
