//! Matrices in memory.

/// A matrix behind a pointer, for kernels. `P` is the pointer. Others make a [`View`] or a [`ViewMut`].
#[derive(Debug, Clone, Copy)]
pub struct RawMatrix<P> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
    pub(crate) data: P,
}

impl<P> RawMatrix<P> {
    /// `rows × columns` whose rows are contiguous and `stride` elements apart.
    pub(crate) fn row_major(data: P, [rows, columns]: [usize; 2], stride: usize) -> Self {
        Self { rows, columns, row_stride: stride, column_stride: 1, data }
    }

    /// The transpose, of the same memory.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            data: self.data,
        }
    }
}

/// A matrix to read: its elements lie in a slice.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    strides: [usize; 2],
}

impl<'a, T> View<'a, T> {
    /// `rows × columns` at the start of `data`, whose rows are contiguous and `stride` elements apart.
    ///
    /// # Panics
    /// `data` is too short.
    pub fn new(data: &'a [T], [rows, columns]: [usize; 2], stride: usize) -> Self {
        check(data.len(), [rows, columns], stride);
        Self { data, rows, columns, strides: [stride, 1] }
    }

    /// A whole slice as `rows × columns` in row-major order.
    ///
    /// # Panics
    /// `data` has another size.
    pub fn of(data: &'a [T], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a matrix of another size");
        Self { data, rows, columns, strides: [columns, 1] }
    }

    /// The transpose, of the same memory.
    #[must_use]
    pub fn t(self) -> Self {
        Self { data: self.data, rows: self.columns, columns: self.rows, strides: [self.strides[1], self.strides[0]] }
    }

    /// `[rows, columns]`.
    pub fn size(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    pub(crate) fn raw(&self) -> RawMatrix<*const T> {
        let [row_stride, column_stride] = self.strides;
        RawMatrix { rows: self.rows, columns: self.columns, row_stride, column_stride, data: self.data.as_ptr() }
    }
}

/// A matrix to write.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a, T> ViewMut<'a, T> {
    /// `rows × columns` at the start of `data`, whose rows are contiguous and `stride` elements apart.
    ///
    /// # Panics
    /// `data` is too short, or rows overlap.
    pub fn new(data: &'a mut [T], [rows, columns]: [usize; 2], stride: usize) -> Self {
        assert!(columns <= stride || rows <= 1, "rows of a result overlap");
        check(data.len(), [rows, columns], stride);
        Self { data, rows, columns, stride }
    }

    /// `[rows, columns]`.
    pub fn size(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    pub(crate) fn raw(&mut self) -> RawMatrix<*mut T> {
        RawMatrix::row_major(self.data.as_mut_ptr(), [self.rows, self.columns], self.stride)
    }
}

fn check(len: usize, [rows, columns]: [usize; 2], stride: usize) {
    let needed = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns };
    assert!(len >= needed, "a matrix {rows} × {columns} with rows {stride} apart needs {needed} elements, found {len}");
}
