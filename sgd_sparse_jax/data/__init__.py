"""Data sets, augmentation and label noise."""

from .augment import (
    crop_and_flip as crop_and_flip,
    random_crop as random_crop,
    random_flip as random_flip,
)
from .fingerprint import fingerprint as fingerprint
from .images import IMAGE_SETS as IMAGE_SETS, Images as Images
from .label_noise import (
    confusions as confusions,
    corrupt_labels as corrupt_labels,
    gaussian_label_noise as gaussian_label_noise,
    share_of as share_of,
    uniform_label_noise as uniform_label_noise,
)
from .load import PATH as PATH, load_images as load_images
from .synthetic import (
    CIRCLE_TEACHER as CIRCLE_TEACHER,
    DEEP_TEACHER as DEEP_TEACHER,
    Examples as Examples,
    Layer as Layer,
    Problem as Problem,
    binary_gaussians as binary_gaussians,
    regression_1d as regression_1d,
    relu_network as relu_network,
    sparse_regression as sparse_regression,
    teacher_student as teacher_student,
)
