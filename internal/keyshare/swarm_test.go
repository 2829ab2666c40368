package keyshare

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"testing"
	"time"
)

// ca signs for nodes as swarm's does.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func toPEM(kind string, der []byte, headers map[string]string) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der, Headers: headers})
}

func newCA(t testing.TB) *ca {
	t.Helper()
	key := newKey(t)
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "swarm-ca"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
	}
	return signed(t, tpl, tpl, key, key)
}

// signed is a CA whose certificate another one has signed.
func signed(t testing.TB, tpl, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *ca {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{cert, key, toPEM("CERTIFICATE", der, nil)}
}

// card is what a node has in its files.
type card struct{ cert, key, roots []byte }

// node signs for a node, as swarmkit does it (ca/certificates.go, PrepareCSR). change
// may make something else of it.
func (c *ca) node(t testing.TB, id, role, swarm string, change ...func(*x509.Certificate)) card {
	t.Helper()
	key := newKey(t)
	names := []string{role, id}
	if role == managerRole {
		names = append(names, "swarm-ca")
	}
	tpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: id, OrganizationalUnit: []string{role}, Organization: []string{swarm}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: names,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	for _, f := range change {
		f(tpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, c.cert, key.Public(), c.key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	headers := map[string]string{"kek-version": "0"}
	if role == managerRole {
		headers["raft-dek"] = "CAESIH8="
	}
	return card{toPEM("CERTIFICATE", der, nil), toPEM("PRIVATE KEY", private, headers), c.pem}
}

func (c card) identity(t testing.TB) Identity {
	t.Helper()
	id, err := Parse(c.cert, c.key, c.roots)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func ended(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
}
