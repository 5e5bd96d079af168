package noise

import (
	"bytes"
	"encoding/base64"
	"io"
	"strings"
	"testing"

	"tailscale.com/control/controlbase"
	"tailscale.com/types/key"
)

func FuzzDecodeInitiation(f *testing.F) {
	init, _, err := controlbase.ClientDeferred(key.NewMachine(), key.NewMachine().Public(), currentVersion)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(base64.StdEncoding.EncodeToString(init))
	f.Add("")
	f.Add("AAAA\r\nAAAA")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := decodeInitiation(s)
		if err == nil && len(b) != initiationSize {
			t.Errorf("accepted %d bytes", len(b))
		}
	})
}

// Whatever comes on a connection, only what the client has written is read, in its order.
func FuzzRecords(f *testing.F) {
	f.Add([]byte{}, uint8(0))
	f.Add([]byte{recordType, 0, 16}, uint8(1))
	f.Add([]byte{recordType, 0xff, 0xff, 0}, uint8(2))
	f.Add([]byte{recordType, 0x0f, 0xfd}, uint8(5))
	f.Fuzz(func(t *testing.T, junk []byte, before uint8) {
		client, in, _, _ := pair(t)
		texts := []string{"one", "two", "three"}
		records := sealed(t, client, in, texts...)
		n := min(int(before), len(records))
		in.w.early = append(bytes.Join(records[:n], nil), junk...)
		in.w.Conn.Close()
		got, _ := io.ReadAll(in)
		if want := strings.Join(texts[:n], ""); string(got) != want {
			t.Errorf("read %q, want %q", got, want)
		}
	})
}
