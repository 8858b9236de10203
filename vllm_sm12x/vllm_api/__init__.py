# SPDX-License-Identifier: Apache-2.0
"""The only package that imports vLLM, one thin module per surface of it.

Version tests live here too. A module is imported when it is needed, never from here: some of
vLLM's own modules are heavy, and none may be touched while vLLM is half imported.
"""
