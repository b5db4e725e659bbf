"""From a composed config to objects: backbone, candidates, data, module, trainer, model.

The only room where configs meet constructors; constructors take plain values.
"""
