# SPDX-License-Identifier: Apache-2.0
"""The classes that vLLM instantiates, each a subclass of one of vLLM's, and their policy."""
