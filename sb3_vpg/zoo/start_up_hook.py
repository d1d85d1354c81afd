"""
Add ``--algo vpg`` to RL Baselines3 Zoo, which has no plugin mechanism.

This file is installed at the top level of site-packages as ``sb3_vpg_zoo_hook``. The line in ``sb3_vpg_zoo_hook.pth``
imports it when the interpreter starts. It imports only ``os`` and ``sys``. After one of rl_zoo3's modules named below has been
imported, it calls :func:`sb3_vpg.zoo.patch` on that module.

To disable the hook, set the environment variable ``SB3_VPG_NO_ZOO_HOOK`` to any non-empty string.
"""

import os
import sys

MODULES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")


class ZooFinder:
    """A finder on ``sys.meta_path``. It finds rl_zoo3's modules by means of the other finders, and adds VPG to them."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in MODULES:
            return None
        # Only the finders behind this one: two hooks would call each other without end
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            # Python, too, skips a finder without this method
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
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
            except Exception as error:  # the zoo's own algorithms must keep working
                import warnings

                warnings.warn(f"sb3_vpg could not add VPG to {module.__name__}: {error!r}", stacklevel=2)

        loader.exec_module = exec_and_patch


if not os.environ.get("SB3_VPG_NO_ZOO_HOOK"):
    sys.meta_path.insert(0, ZooFinder)
