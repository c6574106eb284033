"""For processes that are to be killed: kernels are loaded, batches are small, every moment is another one."""

import dsv4tools.output
from dsv4tools.formats.codecs import prepare

dsv4tools.output.BATCH_SECONDS = 0.03
prepare()
